//! A model directory as llama.cpp keeps a model: one GGUF file.
//!
//! Written for llama.cpp to load ([`Gguf`]): metadata from config.json and the tokenizer's files, or from another
//! GGUF of the same model, and the tensors as llama.cpp's converter would write them. Read where somebody brings a
//! GGUF file of their own: [`check`] that it describes the model of config.json, [`compare`] that it holds its weights.

mod architecture;
mod export;
mod tensors;
mod tokenizer;

pub use architecture::check;
pub use export::export;
pub use tensors::compare;
pub use tokenizer::metadata as tokenizer_metadata;

use crate::weights::ModelFiles;
use anyhow::{Context, Result, bail};
use ipc::{GgufFile, GgufLayout, GgufValue};
use model::Config;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// A model directory laid out as a GGUF file.
pub struct Gguf {
    files: ModelFiles,
    config: Config,
    layout: GgufLayout,
}

impl Gguf {
    /// Plans the file of the model called `name`. Metadata come from `template`, if there is one, and else from the
    /// directory.
    ///
    /// # Errors
    /// The directory holds no model; llama.cpp does not know what it is; the template is of another model.
    pub fn of(model_dir: &Path, name: &str, template: Option<&Path>) -> Result<Gguf> {
        let config = Config::read(model_dir)?;
        architecture::refuse_other_forms(&config)?;
        let files = ModelFiles::open(model_dir, &config)?;
        let tensors = tensors::of(&files, &config)?;
        let mut metadata = match template {
            Some(path) => copied(path, &config)?,
            None => {
                let mut metadata = architecture::metadata(&config, name)?;
                metadata.extend(tokenizer::metadata(model_dir, &config).context(
                    "cannot write this tokenizer for llama.cpp; make a GGUF of the model with llama.cpp's converter, and \
                     give it to `stage --gguf=FILE` or `checkpoint export --gguf-template FILE`",
                )?);
                metadata
            }
        };
        let file_type = ("general.file_type".to_owned(), GgufValue::U32(tensors::file_type(&tensors)));
        metadata.retain(|(key, _)| *key != file_type.0);
        // The architecture stays first, as the format's description asks.
        metadata.insert(1.min(metadata.len()), file_type);
        let new: Vec<_> = tensors.iter().map(tensors::Tensor::described).collect();
        let layout = GgufLayout::new(&metadata, &new);
        drop(tensors);
        Ok(Gguf { files, config, layout })
    }

    /// Size of the file.
    pub fn bytes(&self) -> u64 {
        self.layout.bytes
    }

    /// Number of tensors.
    pub fn tensors(&self) -> usize {
        self.layout.offsets.len()
    }

    /// Writes the file and waits until it is on the disk; calls `progress` with the bytes done and in all.
    ///
    /// # Errors
    /// The system's, with the path.
    pub fn write(&self, path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let mut write = || -> Result<()> {
            let mut out = BufWriter::new(File::create(path)?);
            out.write_all(&self.layout.header)?;
            let mut at = self.layout.header.len() as u64;
            for (tensor, offset) in tensors::of(&self.files, &self.config)?.iter().zip(&self.layout.offsets) {
                pad(&mut out, &mut at, *offset)?;
                tensor.pieces(|piece| {
                    at += piece.len() as u64;
                    progress(at, self.layout.bytes);
                    Ok(out.write_all(piece)?)
                })?;
            }
            pad(&mut out, &mut at, self.layout.bytes)?;
            out.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
            Ok(())
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }
}

fn pad(out: &mut impl Write, at: &mut u64, to: u64) -> std::io::Result<()> {
    let zeros = [0; 64];
    out.write_all(&zeros[..(to - *at) as usize])?;
    *at = to;
    Ok(())
}

/// The metadata of another file of the same model.
fn copied(template: &Path, config: &Config) -> Result<Vec<(String, GgufValue)>> {
    let file = GgufFile::open(template)?;
    check(&file, config)?;
    let tokens = match file.get("tokenizer.ggml.tokens") {
        Some(GgufValue::Array(_, tokens)) => tokens.len(),
        _ => bail!("{}: its metadata hold no tokens", template.display()),
    };
    if tokens != config.decoder.vocab {
        bail!("{}: it has {tokens} tokens, config.json's vocab_size is {}", template.display(), config.decoder.vocab);
    }
    Ok(file.metadata().to_vec())
}

/// What a model is called without another name: as its directory.
pub fn name(model_dir: &Path) -> String {
    let path = model_dir.canonicalize().unwrap_or_else(|_| model_dir.to_owned());
    path.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}
