//! Streaming equals decoding at once, and every token is accounted for.

use lapidary_text::Detokenizer;
use lapidary_text::detokenizer::MAX_HELD_TOKENS;
use proptest::prelude::*;

use crate::{ORACLE, TINY, any_ids, id};

/// The text of each push and what it settled, the end included.
fn stream(ids: &[u32], skip_special: bool) -> Vec<(String, usize)> {
    let mut detokenizer = Detokenizer::new(&TINY, skip_special);
    let mut deltas = Vec::new();
    for &id in ids {
        let mut delta = String::new();
        let num_settled = detokenizer.push(id, &mut delta);
        deltas.push((delta, num_settled));
    }
    let mut delta = String::new();
    let num_settled = detokenizer.finish(&mut delta);
    deltas.push((delta, num_settled));
    deltas
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn the_deltas_together_equal_the_librarys_decode(ids in any_ids(), skip_special: bool) {
        let text: String = stream(&ids, skip_special).into_iter().map(|(delta, _)| delta).collect();
        prop_assert_eq!(text, ORACLE.decode(&ids, skip_special).unwrap());
    }

    #[test]
    fn every_token_is_settled_exactly_once_and_with_its_text(ids in any_ids(), skip_special: bool) {
        let mut num_settled = 0;
        let mut text = String::new();
        for (delta, num_more) in stream(&ids, skip_special) {
            prop_assert!(num_more > 0 || delta.is_empty(), "text came without a token");
            num_settled += num_more;
            text.push_str(&delta);
            prop_assert!(ORACLE.decode(&ids, skip_special).unwrap().starts_with(&text));
        }
        prop_assert_eq!(num_settled, ids.len());
    }

    #[test]
    fn a_valid_run_is_not_held_beyond_the_bound(bytes in prop::collection::vec(0x41..=0x43_u8, 0..2 * MAX_HELD_TOKENS)) {
        let mut detokenizer = Detokenizer::new(&TINY, true);
        let mut text = String::new();
        for byte in bytes {
            detokenizer.push(id(&format!("<0x{byte:02X}>")), &mut text);
            prop_assert!(detokenizer.num_held() < MAX_HELD_TOKENS);
        }
    }
}

#[test]
fn a_character_of_several_byte_tokens_comes_out_whole_when_the_run_ends() {
    let ids: Vec<u32> = "🤗"
        .bytes()
        .map(|byte| id(&format!("<0x{byte:02X}>")))
        .chain([id("a")])
        .collect();
    let deltas = stream(&ids, true);
    assert_eq!(deltas[..4].iter().map(|(_, num_settled)| num_settled).sum::<usize>(), 0);
    assert_eq!(deltas[4], ("🤗a".to_owned(), 5));
}

#[test]
fn an_invalid_byte_turns_the_whole_run_into_replacement_characters_at_once() {
    let ids = [id("<0xC3>"), id("<0xA9>"), id("<0xFF>"), id("<0x41>"), id("a")];
    let deltas = stream(&ids, true);
    assert_eq!(
        deltas[2],
        ("\u{FFFD}\u{FFFD}\u{FFFD}".to_owned(), 3),
        "nothing that follows can save the run"
    );
    assert_eq!(
        deltas[3],
        ("\u{FFFD}".to_owned(), 1),
        "an A in a broken run is lost, as in the library"
    );
    assert_eq!(deltas[4], ("a".to_owned(), 1));
}

#[test]
fn a_skipped_special_token_does_not_end_a_byte_run() {
    let ids = [id("<0xC3>"), id("<eos>"), id("<0xA9>")];
    assert_eq!(ORACLE.decode(&ids, true).unwrap(), "é");
    assert_eq!(stream(&ids, true).last(), Some(&("é".to_owned(), 3)));
    assert_eq!(stream(&ids, false).concat_text(), "\u{FFFD}<eos>\u{FFFD}");
}

#[test]
fn an_endless_valid_run_is_given_out_character_by_character_at_the_bound() {
    let bytes = "é".repeat(MAX_HELD_TOKENS);
    let ids: Vec<u32> = bytes.bytes().map(|byte| id(&format!("<0x{byte:02X}>"))).collect();
    assert_eq!(stream(&ids, true).concat_text(), bytes);
    assert_eq!(
        stream(&ids, true)[MAX_HELD_TOKENS - 1].0,
        "é".repeat(MAX_HELD_TOKENS / 2)
    );
}

trait ConcatText {
    fn concat_text(&self) -> String;
}

impl ConcatText for Vec<(String, usize)> {
    fn concat_text(&self) -> String {
        self.iter().map(|(delta, _)| delta.as_str()).collect()
    }
}
