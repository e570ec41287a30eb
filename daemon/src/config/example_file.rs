//! Holds `apollod.example.toml` and the structs together.

use std::path::{Path, PathBuf};

use super::{Config, Sources, load};

const TEXT: &str = include_str!("../../apollod.example.toml");

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("apollod.example.toml")
}

#[test]
fn the_example_file_loads_and_states_the_defaults() {
    let mut config = Sources { file: Some(path()), ..Sources::default() }.load().unwrap();
    assert_eq!(config.model.dir, Path::new(env!("CARGO_MANIFEST_DIR")).join("model"));
    assert_eq!(config.server.live.take().as_deref(), Some(Path::new("/dev/shm/live")));
    config.model = Default::default();
    assert_eq!(config, Config::default());
}

#[test]
fn the_example_file_loads_with_its_commented_keys_too() {
    let keys = load::fields_of::<Config>();
    let is_key = |line: &str| {
        line.strip_prefix("# ").is_some_and(|rest| {
            rest.split_once(" = ").is_some_and(|(key, _)| key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'))
        })
    };
    let mut commented = 0;
    for (number, line) in TEXT.lines().enumerate().filter(|(_, line)| is_key(line)) {
        commented += 1;
        let section = TEXT.lines().take(number).filter_map(|l| l.strip_prefix('[')?.strip_suffix(']')).last().unwrap();
        assert!(keys.contains(&section));
        let document = format!("[{section}]\n{}\n", line.trim_start_matches("# "));
        toml::from_str::<Config>(&document).unwrap_or_else(|error| panic!("line {}: {error}", number + 1));
    }
    assert_eq!(commented, 17, "commented keys of the example file");
}

#[test]
fn the_example_file_names_every_key() {
    assert_eq!(load::sections().map(|(section, _)| section).as_slice(), load::fields_of::<Config>());
    for (section, keys) in load::sections() {
        let text = TEXT.split(&format!("[{section}]\n")).nth(1).unwrap_or_else(|| panic!("no section [{section}]"));
        let text = text.split("\n[").next().unwrap();
        for key in keys {
            let stated = text.lines().any(|line| line.trim_start_matches("# ").starts_with(&format!("{key} = ")));
            assert!(stated, "{section}.{key} is not in apollod.example.toml");
        }
    }
}
