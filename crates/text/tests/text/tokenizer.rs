//! Encoding, decoding, what tokens are, and what is refused at load.

use lapidary_text::{Rendered, Tokenizer, TokenizerError};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::{ORACLE, SPECIAL, TINY, TINY_CONFIG, TINY_JSON, any_ids, any_text, id, oracle_encode};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn encoding_equals_the_library(text in any_text()) {
        prop_assert_eq!(TINY.encode(&text, false).unwrap(), oracle_encode(&text, false));
    }

    #[test]
    fn a_bos_is_added_once_and_only_if_there_is_none(text in any_text()) {
        let ids = TINY.encode(&text, true).unwrap();
        let expected = oracle_encode(&text, !text.starts_with("<bos>"));
        prop_assert_eq!(ids, expected);
    }

    #[test]
    fn decoding_equals_the_library(ids in any_ids(), skip_special: bool) {
        prop_assert_eq!(TINY.decode(&ids, skip_special), ORACLE.decode(&ids, skip_special).unwrap());
    }

    #[test]
    fn text_survives_the_round_trip(text in any_text().prop_filter("▁ is how the vocabulary spells a space", |text| !text.contains('▁') && !text.contains("<0x"))) {
        prop_assert_eq!(TINY.decode(&TINY.encode(&text, false).unwrap(), false), text);
    }

    #[test]
    fn no_text_has_fewer_tokens_than_the_bound(text in any_text()) {
        prop_assert!(TINY.encode(&text, false).unwrap().len() >= TINY.min_num_tokens(text.len()));
    }
}

#[test]
fn every_id_has_the_librarys_spelling_text_and_flag() {
    for id in 0..TINY.vocab_size() as u32 + 3 {
        let piece = ORACLE.id_to_token(id);
        assert_eq!(TINY.token_str(id), piece.as_deref());
        let Some(piece) = piece else {
            assert_eq!((TINY.token_bytes(id), TINY.token_text(id)), (None, None));
            continue;
        };
        assert_eq!(TINY.token_to_id(&piece), ORACLE.token_to_id(&piece));
        assert_eq!(TINY.token_text(id).unwrap(), ORACLE.decode(&[id], false).unwrap());
        assert_eq!(TINY.is_special(id), SPECIAL.contains(&piece.as_str()));
    }
    assert_eq!(TINY.vocab_size(), ORACLE.get_vocab_size(true));
}

#[test]
fn a_byte_token_is_its_byte_and_a_meta_space_is_a_space() {
    assert_eq!(TINY.token_bytes(id("<0xE5>")), Some(vec![0xE5]));
    assert_eq!(TINY.token_bytes(id("<0x0A>")), Some(b"\n".to_vec()));
    assert_eq!(TINY.token_bytes(id("▁the")), Some(b" the".to_vec()));
    assert_eq!(TINY.token_text(id("<0xE5>")).as_deref(), Some("\u{FFFD}"));
}

#[test]
fn the_named_tokens_are_found() {
    assert_eq!(
        (TINY.pad_id(), TINY.eos_id(), TINY.bos_id()),
        (Some(0), Some(1), Some(2))
    );
    assert_eq!((TINY.start_of_turn_id(), TINY.end_of_turn_id()), (Some(106), Some(107)));
    assert!(TINY.adds_bos());
    let without_config = Tokenizer::from_bytes(TINY_JSON, None).unwrap();
    assert_eq!((without_config.eos_id(), without_config.bos_id()), (Some(1), Some(2)));
    let without_bos = Tokenizer::from_bytes(TINY_JSON, Some(br#"{"add_bos_token": false}"#)).unwrap();
    assert!(!without_bos.adds_bos());
}

#[test]
fn a_tokenizer_can_be_shared_among_threads() {
    fn assert_shareable<T: Send + Sync>() {}
    assert_shareable::<Tokenizer>();
    assert_shareable::<Rendered>();
}

/// The tiny tokenizer with a change to its JSON.
fn tiny_with(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut json: Value = serde_json::from_slice(TINY_JSON).unwrap();
    change(&mut json);
    serde_json::to_vec(&json).unwrap()
}

#[test]
fn truncation_and_padding_of_the_file_are_ignored() {
    let json = tiny_with(|json| {
        json["truncation"] = json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
        json["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<pad>"});
    });
    let tokenizer = Tokenizer::from_bytes(&json, None).unwrap();
    for text in ["a", "the quick brown fox jumps over the lazy dog"] {
        assert_eq!(tokenizer.encode(text, false).unwrap(), oracle_encode(text, false));
    }
}

#[test]
fn an_added_token_matched_after_normalisation_is_left_to_the_library() {
    let json = tiny_with(|json| {
        let token = json!({"id": 733, "content": "the dog", "single_word": true, "lstrip": false, "rstrip": false,
            "normalized": true, "special": false});
        json["added_tokens"].as_array_mut().unwrap().push(token);
    });
    let (ours, library) = (
        Tokenizer::from_bytes(&json, None).unwrap(),
        tokenizers::Tokenizer::from_bytes(&json).unwrap(),
    );
    for text in ["see the dog<eos>the dog", "the dogs", "\nthe dog\n"] {
        assert_eq!(
            ours.encode(text, false).unwrap(),
            library.encode(text, false).unwrap().get_ids(),
            "{text:?}"
        );
    }
    assert_eq!(ours.decode(&[733], false), library.decode(&[733], false).unwrap());
    assert_eq!(ours.token_to_id("the dog"), Some(733));
}

#[test]
fn tokens_of_the_configuration_are_added_and_flagged() {
    let flags = r#""lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true"#;
    let config = format!(
        r#"{{"added_tokens_decoder": {{"733": {{"content": "<tool>", {flags}}}, "4": {{"content": "<mask>", {flags}}}}}}}"#
    );
    let tokenizer = Tokenizer::from_bytes(TINY_JSON, Some(config.as_bytes())).unwrap();
    assert_eq!(tokenizer.encode("<tool><mask>", false).unwrap(), [733, 4]);
    assert!(tokenizer.is_special(733) && tokenizer.is_special(4));

    let config = config.replace("733", "900");
    let error = Tokenizer::from_bytes(TINY_JSON, Some(config.as_bytes())).unwrap_err();
    assert!(
        matches!(error, TokenizerError::AddedTokenMismatch { actual: Some(733), .. }),
        "{error}"
    );
}

#[test]
fn what_cannot_be_streamed_or_split_is_refused_at_load() {
    let refusal = |json: Vec<u8>| Tokenizer::from_bytes(&json, None).unwrap_err();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    assert!(matches!(
        refusal(tiny_with(|json| json["decoder"] = byte_level)),
        TokenizerError::UnsupportedDecoder { .. }
    ));
    assert!(matches!(
        refusal(tiny_with(|json| json["decoder"] = Value::Null)),
        TokenizerError::UnsupportedDecoder { .. }
    ));
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    let error = refusal(tiny_with(|json| json["pre_tokenizer"] = metaspace));
    assert!(matches!(error, TokenizerError::UnsupportedPreTokenizer));
    let error = refusal(tiny_with(|json| json["added_tokens"][0]["lstrip"] = json!(true)));
    assert!(matches!(
        error,
        TokenizerError::UnsupportedAddedToken { flag: "lstrip", .. }
    ));
    let error = refusal(tiny_with(|json| {
        json["model"]["vocab"]["the"] = json!(4_000_000_000_u32)
    }));
    assert!(matches!(
        error,
        TokenizerError::VocabularyTooLarge {
            max_id: 4_000_000_000,
            ..
        }
    ));
    let error = Tokenizer::from_bytes(TINY_JSON, Some(br#"{"bos_token": "<nope>"}"#)).unwrap_err();
    assert!(matches!(error, TokenizerError::UnknownToken { field: "bos_token", .. }));
    assert!(matches!(refusal(b"{}".to_vec()), TokenizerError::Parse { .. }));
    assert!(matches!(
        Tokenizer::from_bytes(TINY_JSON, Some(b"[")).unwrap_err(),
        TokenizerError::Config { .. }
    ));
}

#[test]
fn a_decoder_that_strips_one_leading_space_does_so_once() {
    let json = tiny_with(|json| {
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        json["decoder"]["decoders"].as_array_mut().unwrap().push(strip);
    });
    let (ours, library) = (
        Tokenizer::from_bytes(&json, None).unwrap(),
        tokenizers::Tokenizer::from_bytes(&json).unwrap(),
    );
    for text in [" the dog", "the dog", "   the", "", "<eos> the"] {
        let ids = ours.encode(text, false).unwrap();
        assert_eq!(ours.decode(&ids, true), library.decode(&ids, true).unwrap(), "{text:?}");
    }
}

#[test]
fn loading_a_folder_reads_both_files_and_names_the_missing_one() {
    let dir = std::env::temp_dir().join(format!("lapidary-text-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let error = Tokenizer::load(&dir).unwrap_err();
    assert!(
        matches!(&error, TokenizerError::Read { path, .. } if path.ends_with("tokenizer.json")),
        "{error}"
    );
    std::fs::write(dir.join("tokenizer.json"), TINY_JSON).unwrap();
    assert_eq!(Tokenizer::load(&dir).unwrap().vocab_size(), TINY.vocab_size());
    std::fs::write(dir.join("tokenizer_config.json"), TINY_CONFIG).unwrap();
    assert_eq!(Tokenizer::load(&dir).unwrap().bos_id(), Some(2));
    std::fs::remove_dir_all(&dir).unwrap();
}
