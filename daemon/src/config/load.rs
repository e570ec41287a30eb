//! Reading the configuration from its three layers: file, environment, `--set` flags; later layers win.
//!
//! serde's own message for an unknown key names neither the line nor the nearest key, so keys are checked first,
//! against the names that serde itself would accept ([`fields_of`]).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::de::{DeTable, DeValue};

use super::{
    Config, DreamConfig, GuardConfig, HttpConfig, ModelConfig, QueueConfig, ServerConfig, SyncConfig, TensorRule,
    TrainConfig,
};

/// Keys that are paths; in a file they are relative to the file's folder, elsewhere to the working directory.
const PATHS: [(&str, &str); 8] = [
    ("model", "dir"),
    ("server", "socket"),
    ("server", "manifest"),
    ("server", "live"),
    ("queue", "path"),
    ("guard", "probes"),
    ("dream", "scenarios"),
    ("dream", "replay_examples"),
];

/// Environment variables with the prefix that are not configuration keys.
const OTHER_VARIABLES: [&str; 6] =
    ["APOLLOD_CONFIG", "APOLLOD_URL", "APOLLOD_API_KEY", "APOLLOD_LOG", "APOLLOD_LOG_FORMAT", "APOLLOD_SOCKET"];

const PREFIX: &str = "APOLLOD_";

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not TOML, or a value of the wrong type.
    #[error("{origin}: {message}")]
    Value {
        /// Where: `file:line`, the variable or the flag.
        origin: String,
        /// What is wrong.
        message: String,
    },
    /// A key or section that does not exist.
    #[error("{origin}: unknown key `{key}`; {hint}")]
    UnknownKey {
        /// Where: `file:line`, the variable or the flag.
        origin: String,
        /// The key, with its section.
        key: String,
        /// The nearest key, or all of them.
        hint: String,
    },
    /// A value that parses and makes no sense.
    #[error("{key}: {reason}")]
    Invalid {
        /// `section.key`.
        key: &'static str,
        /// What is wrong and what to do.
        reason: String,
    },
}

/// The layers of a configuration.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The TOML file; `None` starts from the defaults.
    pub file: Option<PathBuf>,
    /// Environment variables; those without the prefix `APOLLOD_` are ignored.
    pub environment: BTreeMap<String, String>,
    /// `section.key=value`, as given to `--set`.
    pub flags: Vec<String>,
}

impl Sources {
    /// A file and flags over this process's environment.
    pub fn of_process(file: Option<PathBuf>, flags: Vec<String>) -> Self {
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| name.starts_with(PREFIX))
            .collect();
        Self { file, environment, flags }
    }

    /// The configuration that the layers give together. It is not yet validated (`Config::validate`).
    ///
    /// # Errors
    /// An unreadable file, a syntax error, an unknown key, a value of the wrong type: each with its place.
    pub fn load(&self) -> Result<Config, ConfigError> {
        let mut merged = match &self.file {
            Some(path) => read_file(path)?,
            None => toml::Table::new(),
        };
        for (name, text) in &self.environment {
            let Some((section, key)) = variable_key(name) else {
                if name.starts_with(PREFIX) && !OTHER_VARIABLES.contains(&name.as_str()) {
                    tracing::warn!("environment variable {name} is ignored: it begins with no section's name");
                }
                continue;
            };
            let origin = format!("environment variable {name}");
            set(&mut merged, &origin, &section, &key, text)?;
        }
        for flag in &self.flags {
            let origin = format!("--set {flag}");
            let Some(((section, key), text)) =
                flag.split_once('=').and_then(|(name, text)| Some((name.trim().split_once('.')?, text.trim())))
            else {
                let message = "not of the form section.key=value, such as train.lr=1e-5".into();
                return Err(ConfigError::Value { origin, message });
            };
            set(&mut merged, &origin, section, key, text)?;
        }
        Config::deserialize(toml::Value::Table(merged))
            .map_err(|error| ConfigError::Value { origin: "configuration".into(), message: plain(error.message()) })
    }
}

/// serde's message with its names of Rust types in plain words.
pub fn plain(message: &str) -> String {
    let Some((before, expected)) = message.split_once("expected ") else { return message.to_owned() };
    let (kind, after) = expected.split_at(expected.find([' ', ',']).unwrap_or(expected.len()));
    let plain = match kind {
        "f32" | "f64" => "a number",
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        // `struct Name`, and perhaps a place after it.
        "struct" => {
            let after = after[1..].find(' ').map_or("", |at| &after[1 + at..]);
            return format!("{before}expected a table of keys{after}");
        }
        _ => return message.replacen("expected a sequence", "expected a list", 1),
    };
    format!("{before}expected {plain}{after}")
}

/// Whether an environment variable sets a configuration key, which a trainer child must not see twice.
pub fn is_config_variable(name: &str) -> bool {
    variable_key(name).is_some()
}

/// `APOLLOD_TRAIN_LR` -> (`train`, `lr`). `None` for a variable that does not start with a section's name: an
/// orchestrator may have set it (a Kubernetes service called apollod sets APOLLOD_PORT), so it is not refused.
fn variable_key(name: &str) -> Option<(String, String)> {
    let rest = name.strip_prefix(PREFIX)?;
    let (section, key) = rest.split_once('_')?;
    let (section, key) = (section.to_ascii_lowercase(), key.to_ascii_lowercase());
    let known = !OTHER_VARIABLES.contains(&name) && fields_of::<Config>().contains(&section.as_str());
    known.then_some((section, key))
}

/// Reads and checks a file; relative paths in it are made relative to its folder.
fn read_file(path: &Path) -> Result<toml::Table, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
    let mut table = parse_file(path, &text)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    for (section, key) in PATHS {
        if let Some(toml::Value::String(value)) = table.get_mut(section).and_then(|section| section.get_mut(key)) {
            *value = folder.join(&*value).to_string_lossy().into_owned();
        }
    }
    let judge = table.get_mut("dream").and_then(|dream| dream.get_mut("judge")?.get_mut("command")?.get_mut(0));
    if let Some(toml::Value::String(program)) = judge
        && program.contains('/')
    {
        *program = folder.join(&*program).to_string_lossy().into_owned();
    }
    Ok(table)
}

fn parse_file(path: &Path, text: &str) -> Result<toml::Table, ConfigError> {
    let at = |offset: usize| format!("{}:{}", path.display(), text[..offset].matches('\n').count() + 1);
    let of_toml = |error: toml::de::Error| ConfigError::Value {
        origin: error.span().map_or_else(|| path.display().to_string(), |span| at(span.start)),
        message: plain(error.message()),
    };
    let document = DeTable::parse(text).map_err(of_toml)?;
    check_keys(document.get_ref(), &at)?;
    toml::from_str::<Config>(text).map_err(of_toml)?;
    toml::from_str(text).map_err(of_toml)
}

/// Refuses the first key that no section has.
fn check_keys(document: &DeTable<'_>, at: &dyn Fn(usize) -> String) -> Result<(), ConfigError> {
    for (section, value) in document {
        let name = section.get_ref().as_ref();
        let Some(known) = keys_of(name) else {
            return Err(unknown(at(section.span().start), name, &format!("[{name}]"), fields_of::<Config>()));
        };
        let DeValue::Table(table) = value.get_ref() else { continue };
        for (key, value) in table {
            let key_name = key.get_ref().as_ref();
            if !known.contains(&key_name) {
                return Err(unknown(at(key.span().start), key_name, &format!("{name}.{key_name}"), known));
            }
            let DeValue::Array(entries) = value.get_ref() else { continue };
            for entry in entries.iter().filter_map(|entry| entry.get_ref().as_table()) {
                let known = fields_of::<TensorRule>();
                if let Some(key) = entry.keys().find(|key| !known.contains(&key.get_ref().as_ref())) {
                    let shown = format!("{name}.{key_name}.{}", key.get_ref());
                    return Err(unknown(at(key.span().start), key.get_ref(), &shown, known));
                }
            }
        }
    }
    Ok(())
}

/// Every section with its keys.
pub fn sections() -> [(&'static str, &'static [&'static str]); 8] {
    [
        ("model", fields_of::<ModelConfig>()),
        ("server", fields_of::<ServerConfig>()),
        ("http", fields_of::<HttpConfig>()),
        ("train", fields_of::<TrainConfig>()),
        ("queue", fields_of::<QueueConfig>()),
        ("sync", fields_of::<SyncConfig>()),
        ("guard", fields_of::<GuardConfig>()),
        ("dream", fields_of::<DreamConfig>()),
    ]
}

/// The keys of a section; `None` when there is no such section.
fn keys_of(section: &str) -> Option<&'static [&'static str]> {
    sections().into_iter().find(|(name, _)| *name == section).map(|(_, keys)| keys)
}

fn unknown(origin: String, name: &str, shown: &str, known: &[&str]) -> ConfigError {
    ConfigError::UnknownKey { origin, key: shown.into(), hint: hint(name, known) }
}

/// "did you mean `x`?", or the list when nothing is near.
pub fn hint(name: &str, known: &[&str]) -> String {
    let nearest = known.iter().max_by(|a, b| similarity(name, a).total_cmp(&similarity(name, b)));
    match nearest {
        Some(nearest) if similarity(name, nearest) > 0.6 => format!("did you mean `{nearest}`?"),
        _ => format!("known are {}", known.join(", ")),
    }
}

fn similarity(a: &str, b: &str) -> f64 {
    strsim::normalized_damerau_levenshtein(a, b).max(strsim::jaro_winkler(a, b) - 0.1)
}

/// Puts one value into the merged table, read as TOML where that fits the key's type and as a string otherwise.
fn set(merged: &mut toml::Table, origin: &str, section: &str, key: &str, text: &str) -> Result<(), ConfigError> {
    let Some(known) = keys_of(section) else {
        return Err(unknown(origin.into(), section, &format!("[{section}]"), fields_of::<Config>()));
    };
    if !known.contains(&key) {
        return Err(unknown(origin.into(), key, &format!("{section}.{key}"), known));
    }
    let as_toml = toml::from_str::<toml::Table>(&format!("value = {text}")).ok().and_then(|mut t| t.remove("value"));
    let candidates = as_toml.into_iter().chain([toml::Value::String(text.into())]);
    let mut first_error = None;
    for value in candidates {
        let alone = toml::Table::from_iter([(key.to_owned(), value.clone())]);
        let document = toml::Table::from_iter([(section.to_owned(), toml::Value::Table(alone))]);
        match Config::deserialize(toml::Value::Table(document)) {
            Ok(_) => {
                let table = merged.entry(section).or_insert_with(|| toml::Value::Table(toml::Table::new()));
                table.as_table_mut().expect("a section that parsed is a table").insert(key.into(), value);
                return Ok(());
            }
            Err(error) => drop(first_error.get_or_insert(error)),
        }
    }
    let message = first_error.map_or_else(String::new, |error| plain(error.message()));
    Err(ConfigError::Value { origin: origin.into(), message: format!("{section}.{key}: {message}") })
}

/// The names of a struct's fields, as serde's derive gives them to a deserializer.
pub fn fields_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    struct Names<'a>(&'a mut &'static [&'static str]);
    impl<'de> serde::Deserializer<'de> for Names<'_> {
        type Error = serde::de::value::Error;
        fn deserialize_any<V: serde::de::Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(serde::de::Error::custom("only a struct has field names"))
        }
        fn deserialize_struct<V: serde::de::Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = fields;
            self.deserialize_any(visitor)
        }
        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }
    let mut names: &'static [&'static str] = &[];
    // The error is the deserializer's way to stop once the names are known.
    let _stopped = T::deserialize(Names(&mut names)).is_err();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> (tempfile::TempDir, Sources) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("apollod.toml");
        std::fs::write(&path, text).unwrap();
        (dir, Sources { file: Some(path), ..Sources::default() })
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line_and_the_nearest_known_one() {
        let (_dir, sources) = file("[train]\nrank = 64\nupdate_proj_gab = 100\n");
        let error = sources.load().unwrap_err().to_string();
        assert!(error.contains("apollod.toml:3"), "{error}");
        assert!(error.contains("`train.update_proj_gab`; did you mean `update_proj_gap`?"), "{error}");
    }

    #[test]
    fn an_unknown_section_is_refused_with_the_nearest_known_one() {
        let (_dir, sources) = file("\n[trian]\nlr = 1.0\n");
        let error = sources.load().unwrap_err().to_string();
        assert!(error.contains("apollod.toml:2") && error.contains("did you mean `train`?"), "{error}");
    }

    #[test]
    fn an_unknown_key_of_a_rule_is_refused() {
        let (_dir, sources) = file("[train]\nrules = [{ patern = \"*\", rule = \"frozen\" }]\n");
        let error = sources.load().unwrap_err().to_string();
        assert!(error.contains("did you mean `pattern`?"), "{error}");
    }

    #[test]
    fn a_value_of_the_wrong_type_is_refused_with_its_line() {
        let (_dir, sources) = file("[train]\n\nrank = \"many\"\n");
        let error = sources.load().unwrap_err().to_string();
        assert!(error.contains("apollod.toml:3") && error.contains("many"), "{error}");
        assert!(error.ends_with("expected a whole number, 0 or more"), "{error}");
        let flags = Sources { flags: vec!["train.lr=fast".into()], ..Sources::default() };
        assert!(flags.load().unwrap_err().to_string().ends_with("expected a number"));
        let (_dir, sources) = file("train = 3\n");
        assert!(sources.load().unwrap_err().to_string().ends_with("expected a table of keys"));
        let (_dir, sources) = file("[train]\nnorm_growth_limit = \"of\"\n");
        let error = sources.load().unwrap_err().to_string();
        assert!(error.contains("a factor such as 1.01, or \"off\""), "{error}");
    }

    #[test]
    fn the_environment_wins_over_the_file_and_flags_over_both() {
        let (_dir, mut sources) = file("[train]\nlr = 1e-3\nrank = 8\nseed = 1\n");
        sources.environment = BTreeMap::from([
            ("APOLLOD_TRAIN_LR".to_owned(), "1e-4".to_owned()),
            ("APOLLOD_TRAIN_UPDATE_PROJ_GAP".to_owned(), "7".to_owned()),
            ("APOLLOD_TRAIN_RANK".to_owned(), "16".to_owned()),
            ("APOLLOD_PORT".to_owned(), "tcp://10.0.0.1:80".to_owned()),
        ]);
        sources.flags = vec!["train.rank=32".into(), "train.norm_growth_limit=off".into()];
        let train = sources.load().unwrap().train;
        assert_eq!((train.lr, train.rank, train.seed, train.update_proj_gap), (1e-4, 32, 1, 7));
        assert_eq!(train.norm_growth_limit, super::super::GrowthLimit::Off);
    }

    #[test]
    fn a_key_of_digits_stays_text() {
        let sources = Sources { flags: vec!["http.api_key=1234567890123456".into()], ..Sources::default() };
        assert_eq!(sources.load().unwrap().http.api_key.as_deref(), Some("1234567890123456"));
    }

    #[test]
    fn unknown_names_in_flags_and_environment_are_refused_by_name() {
        let flags = Sources { flags: vec!["train.lrr=1".into()], ..Sources::default() };
        assert!(flags.load().unwrap_err().to_string().contains("did you mean `lr`?"));
        let environment = BTreeMap::from([("APOLLOD_SYNC_SHEDULE".to_owned(), "x".to_owned())]);
        let error = Sources { environment, ..Sources::default() }.load().unwrap_err().to_string();
        assert!(error.contains("APOLLOD_SYNC_SHEDULE") && error.contains("did you mean `schedule`?"), "{error}");
    }

    #[test]
    fn paths_in_a_file_are_relative_to_its_folder() {
        let (dir, mut sources) = file("[model]\ndir = \"m\"\n[server]\nlive = \"/dev/shm/live\"\n");
        let config = sources.load().unwrap();
        assert_eq!(config.model.dir, dir.path().join("m"));
        assert_eq!(config.server.live.as_deref(), Some(Path::new("/dev/shm/live")));
        sources.flags = vec!["model.dir=here".into()];
        assert_eq!(sources.load().unwrap().model.dir, Path::new("here"));
    }
}
