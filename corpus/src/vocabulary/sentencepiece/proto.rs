//! The door to SentencePiece's `tokenizer.model`: its ModelProto, message by message, read and written without protoc.
//! Source: google/sentencepiece, sentencepiece_model.proto. Fields that this list lacks are lost when a file is rewritten.

use std::fs;
use std::path::Path;

use prost::Message;

use crate::{Error, Result};

/// The file of a tokenizer's folder that SentencePiece reads.
pub(crate) const SENTENCEPIECE: &str = "tokenizer.model";

/// A whole `tokenizer.model`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ModelProto {
    /// A piece's id is its place.
    #[prost(message, repeated, tag = "1")]
    pub pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    pub trainer: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    pub normalizer: Option<NormalizerSpec>,
    #[prost(message, optional, tag = "4")]
    pub self_test: Option<SelfTestData>,
    #[prost(message, optional, tag = "5")]
    pub denormalizer: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Piece {
    #[prost(string, optional, tag = "1")]
    pub piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    pub score: Option<f32>,
    #[prost(enumeration = "Kind", optional, tag = "3")]
    pub r#type: Option<i32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Kind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum ModelType {
    Unigram = 1,
    Bpe = 2,
    Word = 3,
    Char = 4,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct TrainerSpec {
    #[prost(string, repeated, tag = "1")]
    pub input: Vec<String>,
    #[prost(string, optional, tag = "2")]
    pub model_prefix: Option<String>,
    #[prost(enumeration = "ModelType", optional, tag = "3")]
    pub model_type: Option<i32>,
    #[prost(int32, optional, tag = "4")]
    pub vocab_size: Option<i32>,
    #[prost(string, repeated, tag = "5")]
    pub accept_language: Vec<String>,
    #[prost(int32, optional, tag = "6")]
    pub self_test_sample_size: Option<i32>,
    #[prost(string, optional, tag = "7")]
    pub input_format: Option<String>,
    #[prost(float, optional, tag = "10")]
    pub character_coverage: Option<f32>,
    #[prost(uint64, optional, tag = "11")]
    pub input_sentence_size: Option<u64>,
    #[prost(int32, optional, tag = "12")]
    pub mining_sentence_size: Option<i32>,
    #[prost(int32, optional, tag = "13")]
    pub training_sentence_size: Option<i32>,
    #[prost(int32, optional, tag = "14")]
    pub seed_sentencepiece_size: Option<i32>,
    #[prost(float, optional, tag = "15")]
    pub shrinking_factor: Option<f32>,
    #[prost(int32, optional, tag = "16")]
    pub num_threads: Option<i32>,
    #[prost(int32, optional, tag = "17")]
    pub num_sub_iterations: Option<i32>,
    #[prost(int32, optional, tag = "18")]
    pub max_sentence_length: Option<i32>,
    #[prost(bool, optional, tag = "19")]
    pub shuffle_input_sentence: Option<bool>,
    #[prost(int32, optional, tag = "20")]
    pub max_sentencepiece_length: Option<i32>,
    #[prost(bool, optional, tag = "21")]
    pub split_by_unicode_script: Option<bool>,
    #[prost(bool, optional, tag = "22")]
    pub split_by_whitespace: Option<bool>,
    #[prost(bool, optional, tag = "23")]
    pub split_by_number: Option<bool>,
    #[prost(bool, optional, tag = "24")]
    pub treat_whitespace_as_suffix: Option<bool>,
    #[prost(bool, optional, tag = "25")]
    pub split_digits: Option<bool>,
    #[prost(bool, optional, tag = "26")]
    pub allow_whitespace_only_pieces: Option<bool>,
    #[prost(string, repeated, tag = "30")]
    pub control_symbols: Vec<String>,
    #[prost(string, repeated, tag = "31")]
    pub user_defined_symbols: Vec<String>,
    #[prost(bool, optional, tag = "32")]
    pub vocabulary_output_piece_score: Option<bool>,
    #[prost(bool, optional, tag = "33")]
    pub hard_vocab_limit: Option<bool>,
    #[prost(bool, optional, tag = "34")]
    pub use_all_vocab: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    pub byte_fallback: Option<bool>,
    #[prost(string, optional, tag = "36")]
    pub required_chars: Option<String>,
    #[prost(int32, optional, tag = "40")]
    pub unk_id: Option<i32>,
    #[prost(int32, optional, tag = "41")]
    pub bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42")]
    pub eos_id: Option<i32>,
    #[prost(int32, optional, tag = "43")]
    pub pad_id: Option<i32>,
    #[prost(string, optional, tag = "44")]
    pub unk_surface: Option<String>,
    #[prost(string, optional, tag = "45")]
    pub unk_piece: Option<String>,
    #[prost(string, optional, tag = "46")]
    pub bos_piece: Option<String>,
    #[prost(string, optional, tag = "47")]
    pub eos_piece: Option<String>,
    #[prost(string, optional, tag = "48")]
    pub pad_piece: Option<String>,
    #[prost(bool, optional, tag = "49")]
    pub train_extremely_large_corpus: Option<bool>,
    #[prost(bool, optional, tag = "50")]
    pub enable_differential_privacy: Option<bool>,
    #[prost(float, optional, tag = "51")]
    pub differential_privacy_noise_level: Option<f32>,
    #[prost(uint64, optional, tag = "52")]
    pub differential_privacy_clipping_threshold: Option<u64>,
    #[prost(string, optional, tag = "53")]
    pub pretokenization_delimiter: Option<String>,
    #[prost(string, optional, tag = "54")]
    pub seed_sentencepieces_file: Option<String>,
    #[prost(bool, optional, tag = "55")]
    pub auto_character_coverage: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct NormalizerSpec {
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    #[prost(bytes = "vec", optional, tag = "2")]
    pub precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    pub add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    pub remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    pub escape_whitespaces: Option<bool>,
    #[prost(string, optional, tag = "6")]
    pub normalization_rule_tsv: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct SelfTestData {
    #[prost(message, repeated, tag = "1")]
    pub samples: Vec<Sample>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Sample {
    #[prost(string, optional, tag = "1")]
    pub input: Option<String>,
    #[prost(string, optional, tag = "2")]
    pub expected: Option<String>,
}

impl ModelProto {
    /// Reads a file; damage is told with the path.
    pub fn read(path: &Path) -> Result<ModelProto> {
        let bytes = fs::read(path).map_err(Error::io("read", path))?;
        ModelProto::parse(&bytes).map_err(|reason| Error::BadSentencePiece {
            path: path.to_path_buf(),
            reason,
        })
    }

    /// A model from a file's bytes.
    pub fn parse(bytes: &[u8]) -> Result<ModelProto, String> {
        let model = ModelProto::decode(bytes).map_err(|e| e.to_string())?;
        if model.pieces.is_empty() || model.trainer.is_none() {
            return Err("it lacks pieces or the trainer's part".to_owned());
        }
        Ok(model)
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }
}

impl Piece {
    pub fn new(text: impl Into<String>, score: f32, kind: Kind) -> Piece {
        Piece {
            piece: Some(text.into()),
            score: Some(score),
            // SentencePiece leaves its default, NORMAL, out.
            r#type: (kind != Kind::Normal).then_some(kind as i32),
        }
    }

    pub fn text(&self) -> &str {
        self.piece.as_deref().unwrap_or_default()
    }

    /// −0 counts as 0, as it compares.
    pub fn score_or_zero(&self) -> f32 {
        self.score.unwrap_or_default() + 0.0
    }

    /// A kind that this list does not know reads as NORMAL, as in protobuf.
    pub fn kind(&self) -> Kind {
        self.r#type
            .and_then(|kind| Kind::try_from(kind).ok())
            .unwrap_or(Kind::Normal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_read_as_it_was_written_and_damage_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SENTENCEPIECE);
        let model = ModelProto {
            pieces: vec![
                Piece::new("<unk>", 0.0, Kind::Unknown),
                Piece::new("▁the", -3.0, Kind::Normal),
            ],
            trainer: Some(TrainerSpec {
                model_type: Some(ModelType::Bpe as i32),
                input: vec!["a.txt".to_owned()],
                ..Default::default()
            }),
            normalizer: Some(NormalizerSpec {
                remove_extra_whitespaces: Some(false),
                ..Default::default()
            }),
            self_test: Some(SelfTestData {
                samples: vec![Sample {
                    input: Some("a".to_owned()),
                    expected: Some("▁a".to_owned()),
                }],
            }),
            denormalizer: Some(NormalizerSpec::default()),
        };
        let bytes = model.bytes();
        fs::write(&path, &bytes).unwrap();
        assert_eq!(ModelProto::read(&path).unwrap(), model);
        for length in 0..bytes.len() {
            fs::write(&path, &bytes[..length]).unwrap();
            // A message cut between two of its fields is a message; nothing else is.
            match ModelProto::read(&path) {
                Ok(cut) => assert_eq!(cut.pieces, model.pieces),
                Err(error) => assert!(
                    error
                        .to_string()
                        .contains("tokenizer.model is not a SentencePiece model"),
                    "{error}"
                ),
            }
        }
        fs::write(&path, b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01").unwrap();
        assert!(ModelProto::read(&path).is_err());
    }
}
