//! A hub on loopback: one repository, answers that can be scripted, every request recorded.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use ring::digest;

pub(super) const REPO: &str = "org/gem";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the next request for a file is answered.
#[derive(Debug, Clone, Copy)]
pub(super) enum Answer {
    /// The connection breaks after so many bytes.
    CutAfter(usize),
    /// The whole file, whatever was asked.
    IgnoreRange,
    /// Right length, wrong content.
    Damaged,
    /// A status and an `X-Error-Code`.
    Status(u16, &'static str),
    /// A path on the hub itself.
    RedirectTo(&'static str),
}

#[derive(Debug, Clone)]
pub(super) struct Recorded {
    pub(super) path: String,
    pub(super) range: Option<String>,
    pub(super) authorization: Option<String>,
}

#[derive(Default)]
struct State {
    /// Content, and whether it is in large file storage.
    files: BTreeMap<String, (Vec<u8>, bool)>,
    scripts: HashMap<String, VecDeque<Answer>>,
    requests: Vec<Recorded>,
    names_only: bool,
}

pub(super) struct FakeHub {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl FakeHub {
    pub(super) fn with_model() -> Self {
        let hub = Self::start();
        hub.add("config.json", b"{\"model_type\": \"gemma2\"}", false);
        hub.add("tokenizer.json", b"{\"version\": \"1.0\"}", false);
        hub.add("tokenizer_config.json", b"{}", false);
        hub.add("README.md", b"# Gem", false);
        hub.add("gem.gguf", b"GGUF", true);
        let weights: Vec<u8> = (0..50_000u32).map(|i| (i * 31 % 251) as u8).collect();
        hub.add("model.safetensors", &weights, true);
        hub
    }

    pub(super) fn with_shards() -> Self {
        let hub = Self::with_model();
        hub.remove("model.safetensors");
        let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        for name in names {
            hub.add(name, name.as_bytes(), true);
        }
        let index = format!(
            r#"{{"weight_map":{{"a":"{}","b":"{}","c":"{}"}}}}"#,
            names[0], names[1], names[0]
        );
        hub.add("model.safetensors.index.json", index.as_bytes(), false);
        hub
    }

    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        // Ends with the test process: the listener has no other owner.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let state = Arc::clone(&shared);
                std::thread::spawn(move || answer(stream.unwrap(), &state, port));
            }
        });
        Self { port, state }
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(super) fn commit(&self) -> String {
        COMMIT.to_owned()
    }

    pub(super) fn add(&self, name: &str, content: &[u8], large: bool) {
        self.state
            .lock()
            .unwrap()
            .files
            .insert(name.to_owned(), (content.to_owned(), large));
    }

    pub(super) fn remove(&self, name: &str) {
        self.state.lock().unwrap().files.remove(name);
    }

    pub(super) fn content(&self, name: &str) -> Vec<u8> {
        self.state.lock().unwrap().files[name].0.clone()
    }

    pub(super) fn checksum(&self, name: &str) -> String {
        let (content, large) = &self.state.lock().unwrap().files[name];
        checksum(content, *large)
    }

    /// Answers to the next requests for a file's content (`api`: for the description); then all is well again.
    pub(super) fn script<const N: usize>(&self, name: &str, answers: [Answer; N]) {
        self.state
            .lock()
            .unwrap()
            .scripts
            .insert(name.to_owned(), answers.into());
    }

    /// The description has neither sizes nor checksums from now on.
    pub(super) fn list_names_only(&self) {
        self.state.lock().unwrap().names_only = true;
    }

    pub(super) fn requests(&self) -> Vec<Recorded> {
        self.state.lock().unwrap().requests.clone()
    }

    pub(super) fn requests_of(&self, beginning: &str) -> Vec<Recorded> {
        self.requests()
            .into_iter()
            .filter(|request| request.path.starts_with(beginning))
            .collect()
    }
}

fn checksum(content: &[u8], large: bool) -> String {
    let digest = match large {
        true => digest::digest(&digest::SHA256, content),
        false => {
            let object = [format!("blob {}\0", content.len()).as_bytes(), content].concat();
            digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &object)
        }
    };
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Answers one request and closes the connection.
fn answer(mut stream: TcpStream, state: &Mutex<State>, port: u16) {
    let mut lines = BufReader::new(stream.try_clone().unwrap())
        .lines()
        .map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let mut parts = first.split(' ').map(str::to_owned);
    let (method, path) = (parts.next().unwrap(), parts.next().unwrap());
    let headers: HashMap<String, String> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            line.split_once(": ")
                .map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned()))
        })
        .collect();
    let header = |name: &str| headers.get(name).cloned();
    let request = Recorded {
        path,
        range: header("range"),
        authorization: header("authorization"),
    };
    let response = respond(&method, &request, &mut state.lock().unwrap(), port);
    let _ = stream.write_all(&response);
}

fn respond(method: &str, request: &Recorded, state: &mut State, port: u16) -> Vec<u8> {
    state.requests.push(request.clone());
    let name = request
        .path
        .split('?')
        .next()
        .unwrap()
        .rsplit('/')
        .next()
        .unwrap()
        .to_owned();
    let is_description = request.path.starts_with("/api/");
    let is_storage = request.path.starts_with("/storage/");
    let large = state.files.get(&name).is_some_and(|(_, large)| *large);
    // What is scripted happens where the bytes come from.
    let scripted = match (is_description, large && !is_storage) {
        (true, _) => state.scripts.get_mut("api").and_then(VecDeque::pop_front),
        (false, true) => None,
        (false, false) => state.scripts.get_mut(&name).and_then(VecDeque::pop_front),
    };
    match scripted {
        Some(Answer::Status(status, code)) => return head(status, &[("X-Error-Code", code), ("Content-Length", "0")]),
        Some(Answer::RedirectTo(path)) => return head(307, &[("Location", path), ("Content-Length", "0")]),
        _ => {}
    }
    if is_description {
        return whole(describe(state).as_bytes());
    }
    let Some((content, _)) = state.files.get(&name) else {
        return head(404, &[("X-Error-Code", "EntryNotFound")]);
    };
    let (etag, length) = (format!("\"{}\"", checksum(content, large)), content.len().to_string());
    if large && !is_storage {
        // Another name of the same machine is another host.
        let location = format!("http://localhost:{port}/storage/{name}?signature=secret");
        let linked = [
            ("X-Linked-Etag", &*etag),
            ("X-Linked-Size", &*length),
            ("Location", &*location),
        ];
        return head(302, &[&linked[..], &[("Content-Length", "0")]].concat());
    }
    if method == "HEAD" {
        return head(200, &[("ETag", &*etag), ("Content-Length", &*length)]);
    }
    content_answer(content, request.range.as_deref(), scripted)
}

fn content_answer(content: &[u8], range: Option<&str>, scripted: Option<Answer>) -> Vec<u8> {
    let asked = range.map(|range| {
        range
            .trim_start_matches("bytes=")
            .trim_end_matches('-')
            .parse::<usize>()
            .unwrap()
    });
    match (scripted, asked) {
        (Some(Answer::Damaged), _) => whole(&content.iter().map(|byte| byte ^ 1).collect::<Vec<_>>()),
        (Some(Answer::IgnoreRange), _) | (None, None) => whole(content),
        (cut, from) => {
            let from = from.unwrap_or(0);
            let rest = &content[from..];
            let range = format!("bytes {from}-{}/{}", content.len() - 1, content.len());
            let length = rest.len().to_string();
            let status = if asked.is_some() { 206 } else { 200 };
            let sent = if let Some(Answer::CutAfter(bytes)) = cut {
                &rest[..bytes]
            } else {
                rest
            };
            [
                &head(status, &[("Content-Range", &*range), ("Content-Length", &*length)])[..],
                sent,
            ]
            .concat()
        }
    }
}

fn describe(state: &State) -> String {
    let siblings = state.files.iter().map(|(name, (content, large))| {
        let (size, sum) = (content.len(), checksum(content, *large));
        match (state.names_only, large) {
            (true, _) => format!(r#"{{"rfilename":"{name}"}}"#),
            (false, true) => format!(
                r#"{{"rfilename":"{name}","size":{size},"blobId":"{COMMIT}","lfs":{{"sha256":"{sum}","size":{size}}}}}"#
            ),
            (false, false) => format!(r#"{{"rfilename":"{name}","size":{size},"blobId":"{sum}"}}"#),
        }
    });
    format!(
        r#"{{"id":"{REPO}","sha":"{COMMIT}","siblings":[{}]}}"#,
        siblings.collect::<Vec<_>>().join(",")
    )
}

fn head(status: u16, headers: &[(&str, &str)]) -> Vec<u8> {
    let lines: String = headers
        .iter()
        .map(|(name, value)| format!("{name}: {value}\r\n"))
        .collect();
    format!("HTTP/1.1 {status} X\r\nConnection: close\r\n{lines}\r\n").into_bytes()
}

fn whole(body: &[u8]) -> Vec<u8> {
    [&head(200, &[("Content-Length", &body.len().to_string())])[..], body].concat()
}
