//! Whatever comes in through any public function, nothing panics.

use lapidary_text::{ChatTemplate, Detokenizer, Message, PromptEnd, StopMatcher, SystemRole, Tokenizer};
use proptest::prelude::*;

use crate::{TINY, TINY_JSON, gemma};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_text_is_encoded(text: String, add_bos: bool) {
        TINY.encode(&text, add_bos).unwrap();
    }

    #[test]
    fn any_bytes_read_as_text_are_encoded(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        TINY.encode(&String::from_utf8_lossy(&bytes), true).unwrap();
    }

    #[test]
    fn any_ids_are_decoded(ids in prop::collection::vec(any::<u32>(), 0..50), skip_special: bool) {
        TINY.decode(&ids, skip_special);
        let mut detokenizer = Detokenizer::new(&TINY, skip_special);
        for id in ids {
            detokenizer.push(id, &mut String::new());
            TINY.token_bytes(id);
            TINY.is_special(id);
        }
    }

    #[test]
    fn any_conversation_is_rendered_or_refused(
        chat in prop::collection::vec(("system|user|assistant|tool|\\PC{0,5}", any::<String>()), 0..6),
        end in prop::sample::select(vec![PromptEnd::LastTurn, PromptEnd::GenerationPrompt, PromptEnd::FinalMessage]),
        policy in prop::sample::select(vec![SystemRole::Merge, SystemRole::Error]),
    ) {
        let chat: Vec<_> = chat.into_iter().map(|(role, content)| Message::new(role, content)).collect();
        if let Ok(prompt) = gemma(policy).render(&chat, end) {
            TINY.encode_rendered(&prompt).unwrap();
        }
    }

    #[test]
    fn any_template_is_compiled_or_refused(source in "([{]%[-+]?|[-+]?%[}]|[{][{]|[}][}]|generation|endgeneration|if|for m in messages|end|m\\.content|[|]trim|\\PC){0,20}") {
        if let Ok(template) = ChatTemplate::new(&source, &TINY, SystemRole::Merge) {
            let _outcome = template.render(&[Message::new("user", "<eos> hi")], PromptEnd::FinalMessage);
        }
    }

    #[test]
    fn any_stop_strings_are_matched_or_refused(stops in prop::collection::vec(any::<String>(), 0..40), text: String) {
        if let Ok(mut matcher) = StopMatcher::new(&stops, true) {
            let mut out = String::new();
            matcher.push(&text, &mut out);
            matcher.finish(&mut out);
        }
    }

}

proptest! {
    // Each case loads a tokenizer.
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_cut_or_scribbled_tokenizer_file_is_refused_or_loaded(at in 0..TINY_JSON.len(), byte: u8, is_cut: bool) {
        let mut json = TINY_JSON.to_vec();
        if is_cut {
            json.truncate(at);
        } else {
            json[at] = byte;
        }
        if let Ok(tokenizer) = Tokenizer::from_bytes(&json, None) {
            let _outcome = tokenizer.encode("the quick brown fox", true);
        }
    }

    #[test]
    fn any_configuration_is_refused_or_loaded(config in prop::collection::vec(any::<u8>(), 0..40)) {
        let _outcome = Tokenizer::from_bytes(TINY_JSON, Some(&config));
        let _outcome = ChatTemplate::from_config(&config, &TINY, SystemRole::Merge);
    }
}
