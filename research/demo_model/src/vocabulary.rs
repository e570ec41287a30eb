//! The byte-level BPE tokenizer: trained on the generated text, split as GPT-2 does.
//! Ids: bytes and merges first, then the three special tokens at the end, as in Qwen's vocabulary.

use anyhow::{Result, anyhow};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerBuilder,
    TokenizerImpl,
};

use crate::text::{END_OF_TEXT, TURN_END, TURN_START};

/// The tokenizer with its parts still typed, as training leaves it.
pub type Trained = TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// Trains on `lines` until the vocabulary, special tokens included, has `size` entries.
pub fn train(lines: &[String], size: usize) -> Result<Trained> {
    let special = [END_OF_TEXT, TURN_START, TURN_END].map(|t| AddedToken::from(t, true));
    let split = || ByteLevel::new(false, false, true);
    let mut tokenizer: Trained = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<NormalizerWrapper>)
        .with_pre_tokenizer(Some(split().into()))
        .with_post_processor(None::<PostProcessorWrapper>)
        .with_decoder(Some(split().into()))
        .build()
        .map_err(|e| anyhow!("tokenizer: {e}"))?;
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(size - special.len())
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut trainer, lines.iter()).map_err(|e| anyhow!("tokenizer training: {e}"))?;
    tokenizer.add_special_tokens(special).map_err(|e| anyhow!("tokenizer: {e}"))?;
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_comes_back_from_its_tokens() {
        let lines = vec!["Where does Mira live? Mira lives in the green forest.".to_string(); 4];
        let tokenizer = train(&lines, 280).expect("trains");
        let text = "<|im_start|>user\nWhere is Łódź? 12 + 3  = ?<|im_end|>\n";
        let encoding = tokenizer.encode(text, false).expect("encodes");
        assert_eq!(tokenizer.decode(encoding.get_ids(), false).expect("decodes"), text);
        assert_eq!(encoding.get_tokens()[0], TURN_START);
        assert_eq!(tokenizer.get_vocab_size(true), 280);
    }
}
