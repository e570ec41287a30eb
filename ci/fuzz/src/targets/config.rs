//! apollod.toml with what overrides it, and a model's config.json.

use std::collections::BTreeMap;
use std::path::Path;

use apollod::config::{Config, Sources};

use super::{join, parts, with_folder, write};
use crate::Target;

/// The file and, after a NUL, lines of `--set` (`section.key=value`) and of the environment (`NAME=value`). What is valid
/// is written, as for the trainer, and must read as the same.
pub const SETTINGS: Target = Target {
    name: "config",
    accepts: |input| {
        with_folder(|folder| {
            let [file, rest] = parts(input);
            std::fs::create_dir(folder.join("model")).expect("a temporary folder can be made");
            write(folder, "model/config.json", b"{}");
            write(folder, "apollod.toml", file);
            let rest = String::from_utf8_lossy(rest);
            let (environment, flags): (Vec<&str>, Vec<&str>) =
                rest.lines().partition(|line| line.starts_with("APOLLOD_"));
            let environment = environment.iter().filter_map(|line| line.split_once('='));
            let sources = Sources {
                file: Some(folder.join("apollod.toml")),
                environment: environment.map(|(name, value)| (name.into(), value.into())).collect(),
                flags: flags.iter().map(|&flag| flag.into()).collect(),
            };
            let Ok(config) = sources.load() else { return false };
            if config.validate().is_err() {
                return false;
            }
            written_and_read(folder, &config);
            true
        })
    },
    seeds: || {
        let full = "[model]\ndir = \"model\"\n[server]\nlive = \"/dev/shm/live\"\n[train]\nlr = 1e-5\nrank = 8\n\
            norm_growth_limit = \"off\"\nloss_max = 3\nrules = [{ pattern = \"*embed*\", rule = \"frozen\" }]\n[sync]\n\
            schedule = \"*/5 8-18 * * mon-fri\"\ntimezone = \"Europe/Berlin\"\nkeep = 2\n[queue]\ncapacity = 10\n\
            [http]\nlisten = \"127.0.0.1:0\"\n";
        let lines = "train.rank=4\nsync.schedule=@every 30s\nAPOLLOD_TRAIN_LR=0.5\nAPOLLOD_PORT=1";
        vec![join(&[full.as_bytes(), lines.as_bytes()]), full.as_bytes().to_vec(), lines.as_bytes().to_vec()]
    },
    words: &[
        "[train]\n",
        "[sync]\n",
        "[server]\n",
        "[http]\n",
        "[[train.rules]]\n",
        "schedule = \"",
        "timezone = \"UTC\"",
        "@every ",
        "@hourly",
        "*/0",
        "update = \"between\"",
        "window = \"full\"",
        "inf",
        "nan",
        "1979-05-27T07:32:00Z",
        "\nsync.schedule=",
        "\nAPOLLOD_SYNC_SCHEDULE=",
    ],
};

/// config.json of a model, and the tensors that follow from it.
pub const MODEL: Target = Target {
    name: "model_config",
    accepts: |input| {
        let Ok(config) = model::Config::parse(&String::from_utf8_lossy(input)) else { return false };
        assert_eq!(config.windows.len(), config.decoder.layers);
        assert!(!config.decoder.tensors().is_empty());
        assert_eq!(config.rope.table(3, 2).len(), 2 * config.decoder.head_dim);
        true
    },
    seeds: || {
        [
            r#"{"architectures":["Qwen3ForCausalLM"],"hidden_size":64,"num_attention_heads":4,"num_key_value_heads":2,
               "head_dim":16,"intermediate_size":64,"num_hidden_layers":2,"vocab_size":99,"tie_word_embeddings":true,
               "rope_theta":1000000,"sliding_window":null,"eos_token_id":[1,2]}"#,
            r#"{"architectures":["LlamaForCausalLM"],"hidden_size":64,"num_attention_heads":4,"intermediate_size":64,
               "num_hidden_layers":2,"vocab_size":99,"attention_bias":true,"mlp_bias":true,"rope_scaling":{"rope_type":"llama3",
               "factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192}}"#,
            r#"{"architectures":["MistralForCausalLM"],"hidden_size":64,"num_attention_heads":4,"intermediate_size":64,
               "num_hidden_layers":2,"vocab_size":99,"layer_types":["full_attention","sliding_attention"],
               "rope_parameters":{"rope_type":"yarn","factor":4.0,"rope_theta":1e4,"beta_fast":32,"beta_slow":1,"mscale":0.7,
               "attention_factor":1.2,"truncate":false}}"#,
        ]
        .map(|text| text.as_bytes().to_vec())
        .into()
    },
    words: &[
        "\"Qwen2ForCausalLM\"",
        "\"num_hidden_layers\":",
        "\"head_dim\":",
        "\"use_sliding_window\":true",
        "\"sliding_window\":",
        "\"max_window_layers\":",
        "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2.0}",
        "\"original_max_position_embeddings\":",
        "4294967295",
        "1e308",
        "5e-324",
    ],
};

fn written_and_read(folder: &Path, config: &Config) {
    write(folder, "again.toml", config.to_toml().as_bytes());
    let sources = Sources { file: Some(folder.join("again.toml")), environment: BTreeMap::new(), flags: Vec::new() };
    let again = sources.load().unwrap_or_else(|error| panic!("what was written is refused: {error}"));
    assert_eq!(&again, config);
}
