//! Stop strings against a search of the whole text.

use lapidary_text::stop::{MAX_STOP_BYTES, MAX_STOP_STRINGS};
use lapidary_text::{StopError, StopMatcher};
use proptest::prelude::*;

/// Where the text ends and which string stopped it, found the slow way.
fn expected(text: &str, stops: &[String], include_stop: bool) -> (String, Option<usize>) {
    for end in (1..=text.len()).filter(|end| text.is_char_boundary(*end)) {
        let longest = stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| text[..end].ends_with(stop.as_str()));
        if let Some((index, stop)) = longest.rev().max_by_key(|(_, stop)| stop.len()) {
            let kept = if include_stop { end } else { end - stop.len() };
            return (text[..kept].to_owned(), Some(index));
        }
    }
    (text.to_owned(), None)
}

/// Few letters, so that overlaps and false starts abound.
fn text(max: usize) -> impl Strategy<Value = String> {
    let letter = prop::sample::select(vec!["a", "b", "é", "è", "\n", "🤗"]);
    prop::collection::vec(letter, 1..max).prop_map(|letters| letters.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn the_result_does_not_depend_on_the_deltas(
        deltas in prop::collection::vec(text(6), 0..12),
        stops in prop::collection::vec(text(6), 0..5),
        include_stop: bool,
    ) {
        let mut matcher = StopMatcher::new(&stops, include_stop).unwrap();
        let mut out = String::new();
        for delta in &deltas {
            matcher.push(delta, &mut out);
        }
        let index = matcher.matched();
        matcher.finish(&mut out);
        prop_assert_eq!((out, index), expected(&deltas.concat(), &stops, include_stop));
    }

    #[test]
    fn what_is_held_is_exactly_what_may_begin_a_stop_string(
        deltas in prop::collection::vec(text(6), 0..12),
        stops in prop::collection::vec(text(6), 1..5),
    ) {
        let mut matcher = StopMatcher::new(&stops, false).unwrap();
        let (mut pushed, mut out) = (String::new(), String::new());
        for delta in &deltas {
            pushed.push_str(delta);
            if matcher.push(delta, &mut out).is_some() {
                break;
            }
            let may_begin = |start: &usize| stops.iter().any(|stop| stop.starts_with(&pushed[*start..]));
            let starts = (0..=pushed.len()).filter(|start| pushed.is_char_boundary(*start));
            let held_from = starts.into_iter().find(may_begin).unwrap();
            prop_assert_eq!(&out, &pushed[..held_from]);
        }
    }
}

#[test]
fn of_stop_strings_ending_together_the_longest_wins_and_then_the_first() {
    let mut out = String::new();
    let mut matcher = StopMatcher::new(&["c", "bc", "bc"], false).unwrap();
    assert_eq!(matcher.push("abcd", &mut out), Some(1));
    assert_eq!(out, "a");
}

#[test]
fn nothing_comes_after_a_stop() {
    let mut out = String::new();
    let mut matcher = StopMatcher::new(&["b"], true).unwrap();
    assert_eq!(matcher.push("abc", &mut out), Some(0));
    assert_eq!(matcher.push("def", &mut out), Some(0));
    matcher.finish(&mut out);
    assert_eq!(out, "ab");
}

#[test]
fn a_false_start_is_given_out_at_the_end() {
    let mut out = String::new();
    let mut matcher = StopMatcher::new(&["END"], false).unwrap();
    assert_eq!(matcher.push("the EN", &mut out), None);
    assert_eq!((out.as_str(), matcher.num_held_bytes()), ("the ", 2));
    matcher.finish(&mut out);
    assert_eq!(out, "the EN");
}

#[test]
fn bad_lists_are_refused_with_their_numbers() {
    assert_eq!(
        StopMatcher::new(&["a", ""], false).unwrap_err(),
        StopError::Empty { index: 1 }
    );
    let many = vec!["a"; MAX_STOP_STRINGS + 1];
    assert!(matches!(
        StopMatcher::new(&many, false).unwrap_err(),
        StopError::TooMany { count: 33, limit: 32 }
    ));
    let long = "a".repeat(MAX_STOP_BYTES + 1);
    assert!(matches!(
        StopMatcher::new(&[long], false).unwrap_err(),
        StopError::TooLong { num_bytes: 4097, .. }
    ));
}

#[test]
fn adversarial_stop_strings_cost_linear_time() {
    let stop = format!("{}b", "a".repeat(MAX_STOP_BYTES - 1));
    let mut matcher = StopMatcher::new(&[stop], false).unwrap();
    let mut out = String::new();
    for _ in 0..200_000 {
        matcher.push("a", &mut out);
        assert!(matcher.num_held_bytes() < MAX_STOP_BYTES);
    }
    matcher.finish(&mut out);
    assert_eq!(out.len(), 200_000);
}
