//! Load that `lapidary bench` makes for a server.

use super::*;

/// The result file of a run against `server`, and what was printed.
fn bench(server: &Server, name: &str, arguments: &[&str]) -> (i32, String, serde_json::Value) {
    let result = std::env::temp_dir().join(format!("lapidary-bench-{}-{name}.json", std::process::id()));
    let url = format!("http://127.0.0.1:{}", server.port);
    let common = [
        "bench",
        "--base-url",
        &url,
        "--save-detailed",
        "--result-filename",
        result.to_str().unwrap(),
    ];
    let (code, text) = finish(&[&common, arguments].concat());
    let json = std::fs::read_to_string(&result).unwrap_or_else(|error| panic!("{error}: {text}"));
    std::fs::remove_file(result).unwrap();
    (code, text, serde_json::from_str(&json).unwrap())
}

#[test]
fn a_load_is_generated_and_its_figures_add_up() {
    let server = Server::ready(&["serve", "demo", "--max-model-len", "512"]);
    let lens = [
        "--num-prompts",
        "6",
        "--random-input-len",
        "40",
        "--random-output-len",
        "5",
    ];
    let load = [
        &lens[..],
        &["--max-concurrency", "2", "--goodput", "ttft:60000", "e2el:60000"],
    ]
    .concat();
    let (code, text, result) = bench(&server, "random", &load);
    assert!(code == 0 && text.contains("6, 0 failed"), "{text}");
    let number = |key: &str| result[key].as_f64().unwrap_or_else(|| panic!("{key}: {result}"));
    assert_eq!(
        (number("completed"), number("failed"), number("max_concurrency")),
        (6.0, 0.0, 2.0)
    );
    assert_eq!(
        (number("total_input_tokens"), number("total_output_tokens")),
        (240.0, 30.0)
    );
    assert!((number("output_throughput") - 30.0 / number("duration")).abs() < 1e-6);
    assert_eq!(
        number("request_goodput"),
        number("request_throughput"),
        "goals of a minute are met by all"
    );
    assert!(
        number("p99_ttft_ms") <= number("p99_e2el_ms") && number("mean_tpot_ms") > 0.0,
        "{result}"
    );
    assert_eq!(result["ttfts"].as_array().unwrap().len(), 6);
    let metrics = server.get("/metrics").1;
    // One request warms up.
    assert!(
        metrics.contains("lapidary_requests_finished_total{") && metrics.contains("} 7"),
        "{metrics}"
    );

    let chat = [
        &lens[..],
        &["--endpoint", "/v1/chat/completions", "--request-rate", "50"],
    ]
    .concat();
    let (code, text, result) = bench(&server, "chat", &chat);
    assert!(code == 0 && result["completed"] == 6, "{text}");
    assert_eq!(
        (&result["request_rate"], &result["total_output_tokens"]),
        (&50.0.into(), &30.into())
    );
    assert!(result["total_input_tokens"].as_u64().unwrap() >= 200, "{result}");

    let too_long = ["--num-prompts", "3", "--random-input-len", "600", "--num-warmups", "0"];
    let (code, text, result) = bench(&server, "long", &too_long);
    assert!(code == 1 && text.contains("3 times: 400 Bad Request"), "{text}");
    assert_eq!((&result["completed"], &result["failed"]), (&0.into(), &3.into()));
}

#[test]
fn a_file_of_conversations_is_a_load_too() {
    let server = Server::ready(&["serve", "demo"]);
    let path = std::env::temp_dir().join(format!("lapidary-bench-{}.jsonl", std::process::id()));
    let records = [
        r#"{"conversations": [{"from": "human", "value": "What is 1 + 2?"}, {"from": "gpt", "value": "1 + 2 = 3"}]}"#,
        r#"{"prompt": "What is 5 + 6?", "output_tokens": 2}"#,
    ];
    std::fs::write(&path, records.join("\n")).unwrap();
    let data = [
        "--dataset-name",
        "sharegpt",
        "--dataset-path",
        path.to_str().unwrap(),
        "--num-prompts",
        "4",
    ];
    let (code, text, result) = bench(&server, "file", &[&data[..], &["--ignore-eos"]].concat());
    assert!(code == 0 && result["completed"] == 4, "{text}");
    let mut lens: Vec<_> = result["output_lens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|len| len.as_u64().unwrap())
        .collect();
    lens.sort_unstable();
    assert!(
        lens[..2] == [2, 2] && lens[2] == lens[3] && lens[2] > 2,
        "{lens:?}: the answers' lengths"
    );
    let (code, text, _) = bench(&server, "short", &[&data[..], &["--output-len", "1"]].concat());
    assert!(code == 0, "{text}");
    std::fs::remove_file(path).unwrap();
    let (code, text) = finish(&["bench", "--base-url", "http://127.0.0.1:1"]);
    assert!(
        code == 1 && text.contains("cannot connect to 127.0.0.1:1"),
        "{code}: {text}"
    );
    assert_eq!(finish(&["bench", "--goodput", "speed:5"]).0, 2);
}
