mod fake_hub;

use std::cell::RefCell;
use std::time::Duration;

use fake_hub::{Answer, FakeHub, REPO};

use super::*;
use crate::config::Token;

/// A cache folder of its own, removed at the end of the test.
struct CacheDir(PathBuf);

impl CacheDir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("lapidary-hub-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Self(path)
    }

    fn config(&self, hub: &FakeHub) -> HubConfig {
        HubConfig {
            endpoint: hub.endpoint(),
            token: None,
            cache_dir: self.0.clone(),
            offline: false,
            revision: "main".to_owned(),
            ca_bundle: None,
        }
    }

    fn repo(&self) -> PathBuf {
        self.0.join("models--org--gem")
    }

    /// Names of partial files left behind.
    fn incomplete(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.repo().join("blobs")) else {
            return Vec::new();
        };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".incomplete")).collect()
    }
}

impl Drop for CacheDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn fetch_now(config: &HubConfig) -> Result<PathBuf, HubError> {
    fetch_with_backoff(REPO, config, &|_, _| {}, Duration::from_millis(1))
}

fn read(folder: &Path, name: &str) -> Vec<u8> {
    std::fs::read(folder.join(name)).unwrap()
}

#[test]
fn a_download_is_complete_and_laid_out_as_huggingface_hub_does_it() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("layout"));
    let folder = fetch_now(&dir.config(&hub)).unwrap();
    assert_eq!(folder, dir.repo().join("snapshots").join(hub.commit()));
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ] {
        assert_eq!(read(&folder, name), hub.content(name), "{name}");
    }
    let blob = Path::new("../../blobs").join(hub.checksum("model.safetensors"));
    assert_eq!(std::fs::read_link(folder.join("model.safetensors")).unwrap(), blob);
    assert_eq!(read(&dir.repo(), "refs/main"), hub.commit().as_bytes());
    assert!(dir.incomplete().is_empty());
}

#[test]
fn files_that_serving_does_not_need_are_left_alone() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("needed"));
    fetch_now(&dir.config(&hub)).unwrap();
    assert!(
        !hub.requests()
            .iter()
            .any(|request| request.path.contains("README") || request.path.contains("gguf"))
    );
}

#[test]
fn a_second_start_downloads_nothing() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("again"));
    fetch_now(&dir.config(&hub)).unwrap();
    let before = hub.requests().len();
    fetch_now(&dir.config(&hub)).unwrap();
    assert_eq!(hub.requests().len(), before + 1, "only the repository is looked up");
}

#[test]
fn progress_ends_with_all_bytes_and_never_goes_back() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("progress"));
    let seen = RefCell::new(Vec::new());
    let record = |done, total| seen.borrow_mut().push((done, total));
    fetch_with_backoff(REPO, &dir.config(&hub), &record, Duration::from_millis(1)).unwrap();
    let seen = seen.into_inner();
    assert!(seen.is_sorted_by_key(|(done, _)| *done), "{seen:?}");
    let (done, total) = *seen.last().unwrap();
    assert!(done == total && done > hub.content("model.safetensors").len() as u64);
}

#[test]
fn a_cut_connection_is_resumed_where_it_broke() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("cut"));
    hub.script("model.safetensors", [Answer::CutAfter(1000), Answer::CutAfter(500)]);
    let folder = fetch_now(&dir.config(&hub)).unwrap();
    assert_eq!(read(&folder, "model.safetensors"), hub.content("model.safetensors"));
    let ranges: Vec<_> = hub
        .requests_of("/storage/model.safetensors")
        .into_iter()
        .map(|r| r.range)
        .collect();
    assert_eq!(
        ranges,
        [None, Some("bytes=1000-".to_owned()), Some("bytes=1500-".to_owned())]
    );
}

#[test]
fn a_download_goes_on_after_a_restart_of_the_process() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("restart"));
    let blobs = dir.repo().join("blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let partial = blobs.join(format!("{}.incomplete", hub.checksum("model.safetensors")));
    std::fs::write(partial, &hub.content("model.safetensors")[..777]).unwrap();
    let folder = fetch_now(&dir.config(&hub)).unwrap();
    assert_eq!(read(&folder, "model.safetensors"), hub.content("model.safetensors"));
    assert_eq!(
        hub.requests_of("/storage/model.safetensors")[0].range.as_deref(),
        Some("bytes=777-")
    );
}

#[test]
fn a_server_that_knows_no_ranges_sends_the_file_from_the_start() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("noranges"));
    hub.script("model.safetensors", [Answer::CutAfter(1000), Answer::IgnoreRange]);
    let folder = fetch_now(&dir.config(&hub)).unwrap();
    assert_eq!(read(&folder, "model.safetensors"), hub.content("model.safetensors"));
}

#[test]
fn rubbish_left_behind_costs_one_more_download() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("rubbish"));
    let blobs = dir.repo().join("blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(
        blobs.join(format!("{}.incomplete", hub.checksum("model.safetensors"))),
        [7; 99],
    )
    .unwrap();
    let folder = fetch_now(&dir.config(&hub)).unwrap();
    assert_eq!(read(&folder, "model.safetensors"), hub.content("model.safetensors"));
}

#[test]
fn a_damaged_file_is_refused_and_thrown_away() {
    for name in ["model.safetensors", "tokenizer.json"] {
        let (hub, dir) = (FakeHub::with_model(), CacheDir::new("damaged"));
        hub.script(name, [Answer::Damaged]);
        let error = fetch_now(&dir.config(&hub)).unwrap_err();
        assert!(
            matches!(&error, HubError::Checksum { file, .. } if file == name),
            "{error}"
        );
        assert!(dir.incomplete().is_empty());
        assert!(!dir.repo().join("refs/main").exists());
    }
}

#[test]
fn a_server_error_is_tried_again_and_given_up_in_the_end() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("flaky"));
    hub.script("config.json", [Answer::Status(503, ""), Answer::Status(500, "")]);
    fetch_now(&dir.config(&hub)).unwrap();

    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("down"));
    hub.script("config.json", [const { Answer::Status(503, "") }; 10]);
    let error = fetch_now(&dir.config(&hub)).unwrap_err();
    assert!(matches!(error, HubError::Status { status: 503, .. }), "{error}");
    assert_eq!(hub.requests_of("/org/gem/resolve").len(), MAX_FUTILE_ATTEMPTS as usize);
}

#[test]
fn the_token_goes_to_the_hub_and_not_where_the_hub_redirects() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("token"));
    let config = HubConfig {
        token: Some(Token::new("hf_secret")),
        ..dir.config(&hub)
    };
    fetch_now(&config).unwrap();
    for request in hub.requests() {
        let expected = if request.path.starts_with("/storage/") {
            None
        } else {
            Some("Bearer hf_secret".to_owned())
        };
        assert_eq!(request.authorization, expected, "{}", request.path);
    }
    assert!(!hub.requests_of("/storage/").is_empty());
}

#[test]
fn a_renamed_repository_is_followed_with_the_token() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("renamed"));
    hub.script("config.json", [Answer::RedirectTo("/new/name/resolve/x/config.json")]);
    let config = HubConfig {
        token: Some(Token::new("hf_secret")),
        ..dir.config(&hub)
    };
    fetch_now(&config).unwrap();
    assert_eq!(
        hub.requests_of("/new/name/")[0].authorization.as_deref(),
        Some("Bearer hf_secret")
    );
}

#[test]
fn refusals_say_what_to_do() {
    let with_token = Some(Token::new("hf_x"));
    for (status, code, token, expected) in [
        (401, "GatedRepo", &None, "org/gem is gated: accept its licence at "),
        (
            403,
            "GatedRepo",
            &with_token,
            "org/gem is gated and the token has no access",
        ),
        (403, "", &with_token, "a fine-grained token also needs"),
        (
            401,
            "RepoNotFound",
            &None,
            "knows no public repository \"org/gem\": check the spelling",
        ),
        (401, "", &with_token, "refuses the token"),
        (404, "RepoNotFound", &with_token, "knows no repository \"org/gem\""),
        (
            404,
            "RevisionNotFound",
            &None,
            "org/gem has no branch, tag or commit \"main\"",
        ),
        (418, "", &None, "answered 418"),
    ] {
        let (hub, dir) = (FakeHub::with_model(), CacheDir::new("refusal"));
        hub.script("api", [Answer::Status(status, code)]);
        let error = fetch_now(&HubConfig {
            token: token.clone(),
            ..dir.config(&hub)
        })
        .unwrap_err()
        .to_string();
        assert!(error.contains(expected), "{status} {code}: {error}");
    }
}

#[test]
fn a_licence_missed_at_the_first_file_is_named_too() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("gatedfile"));
    hub.script("config.json", [Answer::Status(401, "GatedRepo")]);
    let error = fetch_now(&dir.config(&hub)).unwrap_err();
    assert!(matches!(error, HubError::Gated { .. }), "{error}");
}

#[test]
fn all_shards_of_an_index_are_fetched() {
    let (hub, dir) = (FakeHub::with_shards(), CacheDir::new("shards"));
    let folder = fetch_now(&dir.config(&hub)).unwrap();
    for name in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        assert_eq!(read(&folder, name), hub.content(name));
    }
}

#[test]
fn an_index_cannot_name_files_elsewhere() {
    let hub = FakeHub::with_model();
    hub.add(
        "model.safetensors.index.json",
        br#"{"weight_map":{"a":"../../../../etc/passwd"}}"#,
        false,
    );
    let dir = CacheDir::new("traversal");
    let error = fetch_now(&dir.config(&hub)).unwrap_err();
    assert!(matches!(error, HubError::BadDescription { .. }), "{error}");
}

#[test]
fn a_repository_without_safetensors_is_no_model() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("noweights"));
    hub.remove("model.safetensors");
    let error = fetch_now(&dir.config(&hub)).unwrap_err().to_string();
    assert!(error.starts_with("org/gem has no model.safetensors"), "{error}");
}

#[test]
fn a_revision_has_a_reference_and_a_snapshot_of_its_own() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("revision"));
    let config = HubConfig {
        revision: "refs/pr/1".to_owned(),
        ..dir.config(&hub)
    };
    fetch_now(&config).unwrap();
    assert_eq!(
        hub.requests()[0].path,
        "/api/models/org/gem/revision/refs%2Fpr%2F1?blobs=true"
    );
    assert_eq!(read(&dir.repo(), "refs/refs/pr/1"), hub.commit().as_bytes());
}

#[test]
fn a_commit_needs_no_reference_and_once_here_no_hub() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("commit"));
    let config = HubConfig {
        revision: hub.commit(),
        ..dir.config(&hub)
    };
    let folder = fetch_now(&config).unwrap();
    assert!(!dir.repo().join("refs").exists());
    let before = hub.requests().len();
    assert_eq!(fetch_now(&config).unwrap(), folder);
    assert_eq!(hub.requests().len(), before);
}

#[test]
fn without_network_the_cache_serves_what_is_complete() {
    let (hub, dir) = (FakeHub::with_shards(), CacheDir::new("offline"));
    let offline = HubConfig {
        offline: true,
        ..dir.config(&hub)
    };
    let error = fetch_now(&offline).unwrap_err().to_string();
    assert!(
        error.contains("no record of that revision; downloads are off (HF_HUB_OFFLINE)"),
        "{error}"
    );

    let folder = fetch_now(&dir.config(&hub)).unwrap();
    let before = hub.requests().len();
    assert_eq!(fetch_now(&offline).unwrap(), folder);
    assert_eq!(hub.requests().len(), before, "nobody was asked");

    std::fs::remove_file(folder.join("model-00002-of-00002.safetensors")).unwrap();
    let error = fetch_now(&offline).unwrap_err().to_string();
    assert!(error.contains("no model-00002-of-00002.safetensors"), "{error}");
}

#[test]
fn an_unreachable_hub_does_not_stop_a_restart() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("unreachable"));
    let folder = fetch_now(&dir.config(&hub)).unwrap();
    let nowhere = HubConfig {
        endpoint: "http://127.0.0.1:1".to_owned(),
        ..dir.config(&hub)
    };
    assert_eq!(fetch_now(&nowhere).unwrap(), folder);

    let empty = CacheDir::new("unreachable-empty");
    let error = fetch_now(&HubConfig {
        cache_dir: empty.0.clone(),
        ..nowhere
    })
    .unwrap_err();
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
}

#[test]
fn a_mirror_that_lists_no_checksums_is_asked_file_by_file() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("mirror"));
    hub.list_names_only();
    let folder = fetch_now(&dir.config(&hub)).unwrap();
    assert_eq!(read(&folder, "model.safetensors"), hub.content("model.safetensors"));
    assert_eq!(
        std::fs::read_link(folder.join("config.json"))
            .unwrap()
            .file_name()
            .unwrap(),
        &*hub.checksum("config.json")
    );
}

#[test]
fn two_processes_share_one_download() {
    let (hub, dir) = (FakeHub::with_model(), CacheDir::new("concurrent"));
    let config = dir.config(&hub);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| fetch_now(&config).unwrap());
        }
    });
    assert_eq!(hub.requests_of("/storage/model.safetensors").len(), 1);
}

#[test]
fn only_safe_names_are_names() {
    for name in ["google/gemma-2-9b-it", "RedHatAI/gemma-2-9b-it-FP8", "a/b.c_d"] {
        assert!(is_repository_name(name), "{name}");
    }
    for name in [
        "gpt2", "a/b/c", "../etc", "a/..", "/a", "a/", "a/b c", "a/.b", "a/b--c", "a\\b/c", "~/model",
    ] {
        assert!(!is_repository_name(name), "{name}");
    }
    for name in ["main", "v1.0", "refs/pr/1", "0123456789abcdef0123456789abcdef01234567"] {
        assert!(is_revision_name(name), "{name}");
    }
    for name in ["", "..", "../x", "a//b", "/a", "a/", "a b", "a?b", ".git/x"] {
        assert!(!is_revision_name(name), "{name}");
    }
}
