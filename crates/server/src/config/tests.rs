use lapidary_model::KvCacheDtype;

use super::*;

const COMPLETE_FILE: &str = include_str!("../../../../config/lapidary.toml");

fn resolve(flags: &[&str], environment: &Environment) -> Result<Config, ConfigError> {
    let cli = Cli::try_parse_from([&["lapidary", "serve"], flags].concat()).unwrap();
    let Command::Serve(args) = cli.command else {
        panic!("the command is serve");
    };
    Config::resolve(&args, environment)
}

fn fault(flags: &[&str]) -> String {
    resolve(flags, &Environment::default()).unwrap_err().to_string()
}

/// A file of its own for a test, removed at the end.
struct TestFile(PathBuf);

impl TestFile {
    fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("lapidary-config-{}-{name}", std::process::id()));
        std::fs::write(&path, text).unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for TestFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn the_complete_file_holds_every_default() {
    assert_eq!(toml::from_str::<Settings>(COMPLETE_FILE).unwrap(), Settings::defaults());
}

#[test]
fn the_complete_file_names_every_setting_once() {
    let keys = COMPLETE_FILE.lines().filter_map(|line| {
        let (key, _) = line.strip_prefix("# ").unwrap_or(line).split_once(" = ")?;
        key.chars()
            .all(|c| c.is_ascii_lowercase() || c == '-')
            .then_some(key.to_owned())
    });
    let (mut keys, mut names): (Vec<_>, Vec<_>) = (keys.collect(), setting_names().collect());
    keys.sort();
    names.sort();
    assert_eq!(keys, names);
}

#[test]
fn the_commented_examples_of_the_complete_file_are_valid() {
    let uncommented = |line: &str| match line.strip_prefix("# ") {
        Some(rest)
            if rest
                .split_once(" = ")
                .is_some_and(|(key, _)| setting_names().any(|name| name == key)) =>
        {
            format!("{rest}\n")
        }
        _ => format!("{line}\n"),
    };
    let text: String = COMPLETE_FILE.lines().map(uncommented).collect();
    let settings: Settings = toml::from_str(&text).unwrap();
    assert_eq!(settings.kv_cache_memory_bytes.unwrap().0, 4 << 30);
}

#[test]
fn help_states_the_defaults_in_effect() {
    let defaults = toml::Table::try_from(Settings::defaults()).unwrap();
    let command = <Settings as clap::Args>::augment_args(clap::Command::new("settings"));
    for arg in command.get_arguments() {
        let name = arg.get_long().unwrap();
        let help = arg.get_help().unwrap().to_string();
        let Some(default) = defaults.get(name) else { continue };
        let default = default.to_string().replace('"', "");
        let stated = help
            .split("[default: ")
            .nth(1)
            .map(|rest| rest.trim_end_matches(']'))
            .map(|rest| {
                let seconds = rest.strip_suffix('s').filter(|number| number.parse::<u64>().is_ok());
                seconds.unwrap_or(rest)
            });
        if name != "model" && name != "revision" {
            assert_eq!(stated, Some(default.as_str()), "--{name}");
        }
    }
}

#[test]
fn flags_win_over_variables_and_variables_over_the_file() {
    let file = TestFile::new("layers.toml", "port = 1\nmax-num-seqs = 2\nmax-logprobs = 3\n");
    let environment = Environment::from([("LAPIDARY_PORT", "10"), ("LAPIDARY_MAX_NUM_SEQS", "20")]);
    let settings = resolve(&["--config", file.path(), "--port", "100"], &environment)
        .unwrap()
        .settings;
    assert_eq!(
        (settings.port, settings.max_num_seqs, settings.max_logprobs),
        (Some(100), Some(20), Some(3))
    );
}

#[test]
fn every_setting_can_be_a_variable() {
    for name in setting_names() {
        let value = match name.as_str() {
            "system-role" => "error",
            "generation-config" => "vllm",
            "device" => "cpu",
            "scheduling-policy" => "priority",
            "kv-cache-dtype" => "fp8",
            "log-format" => "json",
            "ssl-cert-reqs" => "optional",
            "unauthenticated-metrics" | "allow-credentials" | "ui" => "false",
            name if ["enable-", "enforce-", "trust-"]
                .iter()
                .any(|verb| name.starts_with(verb)) =>
            {
                "false"
            }
            _ => "7",
        };
        let variable = format!("LAPIDARY_{}", name.to_ascii_uppercase().replace('-', "_"));
        let (settings, unknown) =
            read_environment(&Environment(BTreeMap::from([(variable, value.to_owned())]))).unwrap();
        let table = toml::Table::try_from(settings).unwrap();
        assert_eq!((table.len(), unknown.len()), (1, 0), "{name}");
        assert!(table.contains_key(&name), "{name}");
    }
}

#[test]
fn prefix_caching_is_switched_off_as_in_vllm() {
    let enabled = |flags: &[&str], environment| resolve(flags, &environment).unwrap().scheduling.enable_prefix_caching;
    let none = Environment::default;
    assert!(enabled(&[], none()));
    assert!(!enabled(&["--no-enable-prefix-caching"], none()));
    assert!(!enabled(&["--enable-prefix-caching=false"], none()));
    assert!(enabled(
        &["--no-enable-prefix-caching", "--enable-prefix-caching"],
        none()
    ));
    assert!(!enabled(
        &["--no-enable-prefix-caching"],
        [("LAPIDARY_ENABLE_PREFIX_CACHING", "true")].into()
    ));
}

#[test]
fn what_answers_tell_is_decided_by_the_operator() {
    let limits = |flags: &[&str]| resolve(flags, &Environment::default()).unwrap().limits;
    let told = |limits: Limits| {
        [
            limits.prompt_tokens_details,
            limits.force_include_usage,
            limits.per_request_metrics,
            limits.trust_request_chat_template,
        ]
    };
    assert_eq!(told(limits(&[])), [true, false, false, false]);
    let flags = [
        "--enable-prompt-tokens-details=false",
        "--enable-force-include-usage",
        "--enable-per-request-metrics",
        "--trust-request-chat-template",
    ];
    assert_eq!(told(limits(&flags)), [false, true, true, true]);
}

#[test]
fn served_names_are_a_list_in_each_place() {
    let names = |flags: &[&str], environment: Environment| resolve(flags, &environment).unwrap().load.names;
    assert_eq!(
        names(&["--served-model-name", "a", "b"], Environment::default()),
        ["a", "b"]
    );
    assert_eq!(names(&[], [("LAPIDARY_SERVED_MODEL_NAME", "a,b")].into()), ["a", "b"]);
    assert_eq!(names(&["org/name"], Environment::default()), ["org/name"]);
    assert_eq!(names(&[], Environment::default()), ["demo"]);
}

#[test]
fn a_misspelt_key_of_the_file_is_an_error_that_names_it() {
    let file = TestFile::new("misspelt.toml", "max-modell-len = 4096\n");
    let error = resolve(&["--config", file.path()], &Environment::default()).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("max-modell-len") && cause.contains("line 1"), "{cause}");
}

#[test]
fn a_misspelt_variable_is_reported() {
    let config = resolve(&[], &[("LAPIDARY_MAX_MODELL_LEN", "4096")].into()).unwrap();
    assert_eq!(config.unknown_variables, ["LAPIDARY_MAX_MODELL_LEN"]);
}

#[test]
fn a_bad_variable_is_named() {
    let error = resolve(&[], &[("LAPIDARY_MAX_NUM_SEQS", "many")].into())
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("LAPIDARY_MAX_NUM_SEQS: ") && error.contains("many"),
        "{error}"
    );
}

#[test]
fn variables_kubernetes_sets_for_a_service_of_our_name_are_no_settings() {
    let environment = Environment::from([
        ("LAPIDARY_PORT", "tcp://10.0.0.1:8000"),
        ("LAPIDARY_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ("LAPIDARY_SERVICE_HOST", "10.0.0.1"),
    ]);
    let config = resolve(&[], &environment).unwrap();
    assert_eq!(config.settings.port, Some(8000));
    assert!(config.unknown_variables.is_empty());
}

#[test]
fn impossible_values_are_refused_with_the_setting_s_name() {
    for (flags, beginning) in [
        (
            &["--dtype", "float16"][..],
            "dtype: Gemma-2's activations overflow float16",
        ),
        (
            &["--tensor-parallel-size", "2"],
            "tensor-parallel-size: 2 is not possible",
        ),
        (&["--max-num-seqs", "0"], "max-num-seqs: must be at least 1"),
        (
            &["--max-num-batched-tokens", "8", "--max-num-seqs", "9"],
            "max-num-batched-tokens: must be at least max-num-seqs",
        ),
        (&["--block-size", "24"], "block-size: must be a power of two"),
        (
            &["--header-read-timeout", "0"],
            "header-read-timeout: must be more than 0",
        ),
        (
            &["--query-pre-attn-scalar", "0"],
            "query-pre-attn-scalar: must be a positive number",
        ),
        (&["--write-timeout", "0"], "write-timeout: must be more than 0"),
        (&["--api-key", ""], "api-key: a key is empty"),
        (&["--api-key-file", "/no/such/file"], "api-key-file: there is no file"),
        (
            &["--max-concurrency-per-key", "1"],
            "max-concurrency-per-key: has no effect without api-key",
        ),
        (
            &["--allowed-origins", "chat.example"],
            "allowed-origins: \"chat.example\"",
        ),
        (&["--allowed-methods", "GE T"], "allowed-methods: \"GE T\""),
        (&["--root-path", "gem"], "root-path: must be a path"),
        (&["--ssl-keyfile", "/etc/hostname"], "ssl-certfile: is needed"),
        (&["--ssl-ca-certs", "/no/such/file"], "ssl-ca-certs: there is no file"),
        (
            &["--ssl-ca-certs", "/etc/hostname"],
            "ssl-certfile: is needed with ssl-ca-certs",
        ),
        (&["--ssl-cert-reqs", "2"], "ssl-ca-certs: is needed to ask"),
        (&["--log-level", "lapidary=loud"], "log-level: "),
        (&["--chat-template", "/no/such/file"], "chat-template: there is no file"),
        (&["--served-model-name", ""], "served-model-name: a name is empty"),
        (&["/no/such/folder"], "model: \"/no/such/folder\" is neither `demo`"),
        (&["/etc/hostname"], "model: \"/etc/hostname\" is a file"),
        (&["demo", "--model", "org/name"], "model: given twice"),
        (&["--revision", "../main"], "revision: "),
    ] {
        let error = fault(flags);
        assert!(error.starts_with(beginning), "{flags:?}: {error}");
    }
}

#[test]
fn clients_need_certificates_where_a_ca_is_named_unless_told_otherwise() {
    let file = "/etc/hostname";
    let clients = |flags: &[&str]| {
        let files = ["--ssl-certfile", file, "--ssl-keyfile", file];
        let config = resolve(&[&files[..], flags].concat(), &Environment::default()).unwrap();
        let clients = config.http.tls.unwrap().clients;
        clients.map(|clients| (clients.ca_certs, clients.is_required))
    };
    let ca = ["--ssl-ca-certs", file];
    let with = |whether| clients(&[&ca[..], &["--ssl-cert-reqs", whether]].concat());
    assert_eq!(clients(&[]), None);
    assert_eq!(clients(&ca), Some((file.into(), true)));
    for (whether, is_required) in [("required", true), ("2", true), ("optional", false), ("1", false)] {
        assert_eq!(with(whether), Some((file.into(), is_required)), "{whether}");
    }
    assert_eq!(
        (with("none"), with("0"), clients(&["--ssl-cert-reqs", "0"])),
        (None, None, None)
    );
}

#[test]
fn what_print_config_shows_is_a_settings_file_with_the_same_meaning() {
    let config = resolve(
        &["--kv-cache-memory-bytes", "1GiB", "--drain-grace", "250ms"],
        &Environment::default(),
    )
    .unwrap();
    let text = config.to_toml().unwrap();
    let file = TestFile::new("printed.toml", &text);
    let again = resolve(&["--config", file.path()], &Environment::default()).unwrap();
    assert_eq!(again.settings, config.settings);
    assert!(text.contains("# max-model-len: decided by the model"), "{text}");
}

#[test]
fn the_hub_is_found_as_huggingface_hub_finds_it() {
    let hub = |variables: Environment| resolve(&[], &variables).unwrap().hub;
    let cache = |variables| hub(variables).cache_dir;
    assert_eq!(cache([("HOME", "/u")].into()), Path::new("/u/.cache/huggingface/hub"));
    assert_eq!(cache([("HOME", "/u"), ("HF_HOME", "/h")].into()), Path::new("/h/hub"));
    assert_eq!(
        cache([("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h")].into()),
        Path::new("/c")
    );
    assert_eq!(
        hub([("HF_ENDPOINT", "http://mirror/")].into()).endpoint,
        "http://mirror"
    );
    assert!(hub([("HF_HUB_OFFLINE", "1")].into()).offline);
    assert!(!hub([("HF_HUB_OFFLINE", "0")].into()).offline);
    assert_eq!(hub([("HF_TOKEN", " hf_x\n")].into()).token, Some(Token::new("hf_x")));
}

#[test]
fn the_token_is_read_from_the_login_file_and_never_printed() {
    let file = TestFile::new("token", "hf_secret\n");
    let hub = resolve(&[], &[("HF_TOKEN_PATH", file.path())].into()).unwrap().hub;
    assert_eq!(hub.token.as_ref().unwrap().expose(), "hf_secret");
    assert!(!format!("{hub:?}").contains("secret"));
}

#[test]
fn browsers_are_let_in_as_vllm_is_told() {
    let flags = [
        "--allowed-origins",
        r#"["https://a.example", "https://b.example"]"#,
        "--allowed-methods",
        "GET,POST",
    ];
    let settings = resolve(&flags, &Environment::default()).unwrap().settings;
    assert_eq!(
        settings.allowed_origins.unwrap().0,
        ["https://a.example", "https://b.example"]
    );
    assert_eq!(settings.allowed_methods.unwrap().0, ["GET", "POST"]);
}

#[test]
fn api_keys_are_never_printed() {
    let config = resolve(&["--api-key", "sk-hush"], &[("VLLM_API_KEY", "sk-mum")].into()).unwrap();
    let text = format!("{config:?} {:?}", config.access.open().unwrap());
    assert!(!text.contains("sk-"), "{text}");
}

#[test]
fn the_command_line_is_well_formed() {
    <Cli as clap::CommandFactory>::command().debug_assert();
}

#[test]
fn fp8_keys_and_values_are_e4m3_by_both_names_and_nothing_else_is_known() {
    let dtype = |flags: &[&str]| {
        let config = resolve(flags, &Environment::default()).unwrap();
        config.scheduling.kv_cache_dtype.dtype()
    };
    assert_eq!(dtype(&[]), KvCacheDtype::Native);
    assert_eq!(dtype(&["--kv-cache-dtype", "auto"]), KvCacheDtype::Native);
    assert_eq!(dtype(&["--kv-cache-dtype", "fp8"]), KvCacheDtype::Fp8E4m3);
    assert_eq!(dtype(&["--kv-cache-dtype=fp8_e4m3"]), KvCacheDtype::Fp8E4m3);
    let variable = Environment::from([("LAPIDARY_KV_CACHE_DTYPE", "fp8_e4m3")]);
    let config = resolve(&[], &variable).unwrap();
    assert_eq!(config.scheduling.kv_cache_dtype.as_str(), "fp8_e4m3");

    for unknown in ["fp8_e5m2", "int8", "bfloat16"] {
        let message = Cli::try_parse_from(["lapidary", "serve", "--kv-cache-dtype", unknown])
            .unwrap_err()
            .to_string();
        let named = ["--kv-cache-dtype", unknown, "[possible values: auto, fp8, fp8_e4m3]"];
        assert!(named.iter().all(|part| message.contains(part)), "{message}");
        let file = TestFile::new(&format!("{unknown}.toml"), &format!("kv-cache-dtype = \"{unknown}\"\n"));
        let error = resolve(&["--config", file.path()], &Environment::default()).unwrap_err();
        let message = format!("{:#}", crate::logging::CauseChain(&error));
        assert!(
            message.contains(unknown) && message.contains("`auto`, `fp8`, `fp8_e4m3`"),
            "{message}"
        );
    }
}
