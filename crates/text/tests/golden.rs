//! Equality with transformers on the cases of `tests/fixtures/golden/tokenizer`, which its script recorded.
#![expect(
    clippy::unwrap_used,
    reason = "clippy takes the functions that tests share for production code"
)]

use std::path::PathBuf;

use lapidary_text::{
    ChatTemplate, ConversationError, Detokenizer, Message, PromptEnd, SystemRole, TemplateError, Tokenizer,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;

#[derive(Deserialize)]
struct Cases {
    encode: Vec<EncodeCase>,
    decode: Vec<DecodeCase>,
    chat: Vec<ChatCase>,
    chat_errors: Vec<ChatErrorCase>,
}

#[derive(Deserialize)]
struct EncodeCase {
    text: String,
    ids: Vec<u32>,
    ids_with_special: Vec<u32>,
    decoded_text: String,
    decoded_text_skip_special: String,
}

#[derive(Deserialize)]
struct DecodeCase {
    about: String,
    ids: Vec<u32>,
    text: String,
    text_skip_special: String,
}

#[derive(Deserialize)]
struct ChatCase {
    messages: Vec<GoldenMessage>,
    add_generation_prompt: bool,
    prompt: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct ChatErrorCase {
    messages: Vec<GoldenMessage>,
    error: String,
}

#[derive(Deserialize)]
struct GoldenMessage {
    role: String,
    content: String,
}

fn folder() -> PathBuf {
    PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/fixtures/golden/tokenizer"
    ))
}

fn read<T: DeserializeOwned>(name: &str) -> T {
    let path = folder().join(name);
    let json = std::fs::read(&path).unwrap_or_else(|error| panic!("{} is missing: {error}", path.display()));
    serde_json::from_slice(&json).unwrap()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::load(&folder()).unwrap()
}

fn template(tokenizer: &Tokenizer) -> ChatTemplate {
    ChatTemplate::load(&folder(), tokenizer, SystemRole::Error)
        .unwrap()
        .unwrap()
}

fn messages(golden: &[GoldenMessage]) -> Vec<Message> {
    golden
        .iter()
        .map(|message| Message::new(&message.role, &message.content))
        .collect()
}

#[test]
fn texts_have_the_recorded_ids() {
    let tokenizer = tokenizer();
    let cases = read::<Cases>("cases.json").encode;
    assert!(cases.len() >= 50, "the file must hold the cases");
    for case in cases {
        assert_eq!(
            tokenizer.encode(&case.text, false).unwrap(),
            case.ids,
            "{:?}",
            case.text
        );
        let with_bos = tokenizer.encode(&case.text, true).unwrap();
        // transformers adds a second BOS to a text that begins with one; this crate never does.
        let expected = if case.text.starts_with("<bos>") {
            &case.ids
        } else {
            &case.ids_with_special
        };
        assert_eq!(&with_bos, expected, "{:?}", case.text);
        assert_eq!(tokenizer.decode(&case.ids_with_special, false), case.decoded_text);
        assert_eq!(
            tokenizer.decode(&case.ids_with_special, true),
            case.decoded_text_skip_special
        );
    }
}

#[test]
fn ids_have_the_recorded_text_at_once_and_streamed() {
    let tokenizer = tokenizer();
    let cases = read::<Cases>("cases.json").decode;
    assert!(cases.len() >= 50, "the file must hold the cases");
    for case in cases {
        for (skip_special, expected) in [(false, &case.text), (true, &case.text_skip_special)] {
            assert_eq!(&tokenizer.decode(&case.ids, skip_special), expected, "{}", case.about);
            let mut detokenizer = Detokenizer::new(&tokenizer, skip_special);
            let mut text = String::new();
            let num_settled: usize = case.ids.iter().map(|id| detokenizer.push(*id, &mut text)).sum();
            assert_eq!(
                num_settled + detokenizer.finish(&mut text),
                case.ids.len(),
                "{}",
                case.about
            );
            assert_eq!(&text, expected, "{}", case.about);
        }
    }
}

#[test]
fn chats_have_the_recorded_prompt_and_ids() {
    let tokenizer = tokenizer();
    let template = template(&tokenizer);
    let specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"];
    let cases = read::<Cases>("cases.json").chat;
    assert!(cases.len() >= 10, "the file must hold the cases");
    for case in cases {
        let end = if case.add_generation_prompt {
            PromptEnd::GenerationPrompt
        } else {
            PromptEnd::LastTurn
        };
        let rendered = template.render(&messages(&case.messages), end);
        // transformers turns any role into a turn of that name, whatever it contains; this crate checks roles.
        if case.messages.iter().any(|message| message.role == "tool") {
            let error = rendered.unwrap_err();
            assert!(
                matches!(
                    error,
                    TemplateError::Conversation(ConversationError::UnknownRole { .. })
                ),
                "{error}"
            );
            continue;
        }
        let rendered = rendered.unwrap();
        assert_eq!(rendered.text(), case.prompt);
        assert_eq!(
            tokenizer.encode(rendered.text(), false).unwrap(),
            case.ids,
            "{:?}",
            case.prompt
        );
        let ids = tokenizer.encode_rendered(&rendered).unwrap();
        let is_forging = |message: &GoldenMessage| specials.iter().any(|special| message.content.contains(special));
        if case.messages.iter().any(is_forging) {
            let count = |ids: &[u32]| ids.iter().filter(|id| tokenizer.is_special(**id)).count();
            assert_eq!(
                count(&ids) + rendered.literals().len(),
                count(&case.ids),
                "{:?}",
                case.prompt
            );
            assert_eq!(tokenizer.decode(&ids, false), case.prompt);
        } else {
            assert_eq!(ids, case.ids, "{:?}", case.prompt);
        }
    }
}

#[test]
fn chats_that_the_template_refuses_are_refused_in_its_words() {
    let tokenizer = tokenizer();
    let template = template(&tokenizer);
    let cases = read::<Cases>("cases.json").chat_errors;
    assert!(!cases.is_empty(), "the file must hold the cases");
    for case in cases {
        let error = template
            .render(&messages(&case.messages), PromptEnd::GenerationPrompt)
            .unwrap_err();
        match case.messages.iter().position(|message| message.role == "system") {
            // Refused before the template sees it, so that the error can name the message.
            Some(index) => match error {
                TemplateError::Conversation(error) => assert_eq!(error.message_index(), Some(index)),
                other => panic!("{other}"),
            },
            None => {
                assert!(matches!(error, TemplateError::Raised { .. }), "{error}");
                assert_eq!(error.to_string(), case.error);
            }
        }
    }
}
