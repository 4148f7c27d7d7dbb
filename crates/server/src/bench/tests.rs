use super::client::{Client, ClientError, Event, Events, Usage};
use super::*;

fn event(has_text: bool, usage: Option<(u64, u64)>) -> Event {
    let usage = usage.map(|(prompt_tokens, completion_tokens)| Usage {
        prompt_tokens,
        completion_tokens,
    });
    Event {
        has_text,
        is_end: false,
        usage,
    }
}

#[test]
fn events_are_found_however_the_bytes_are_cut() {
    let stream = concat!(
        ": ping\n\n",
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"é\"}}],\"usage\":null}\r\n\r\n",
        "data:{\"choices\":[{\"text\":\"b\"}]}\n\n",
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"total_tokens\":5,\"completion_tokens\":2}}\n\n",
        "data: [DONE]\n\n",
    );
    let expected = [
        event(false, None),
        event(true, None),
        event(true, None),
        Event {
            is_end: true,
            ..event(false, None)
        },
        event(false, Some((3, 2))),
    ];
    for size in [1, 2, 3, 7, 50, stream.len()] {
        let mut events = Events::default();
        let pieces = stream.as_bytes().chunks(size);
        let found: Vec<_> = pieces.flat_map(|piece| events.push(piece).unwrap()).collect();
        assert_eq!(found, expected, "in pieces of {size}");
        assert!(events.is_done);
    }
    let failed = Events::default().push(b"data: {\"error\":{\"message\":\"gone\"}}\n");
    assert!(matches!(failed, Err(ClientError::Stream(message)) if message.contains("gone")));
}

#[test]
fn arrivals_are_a_poisson_process_of_their_rate() {
    let start = Instant::now();
    let mut arrivals = Arrivals::new(50.0, 7, start);
    let times: Vec<_> = (0..20_001).map(|_| (arrivals.next() - start).as_secs_f64()).collect();
    let gaps: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let mean = gaps.iter().sum::<f64>() / 20_000.0;
    assert!((mean - 0.02).abs() < 0.0005, "{mean}");
    // Exponential: as much deviation as mean, and a share of 1/e above the mean.
    let deviation = (gaps.iter().map(|gap| (gap - mean) * (gap - mean)).sum::<f64>() / 20_000.0).sqrt();
    assert!((deviation / mean - 1.0).abs() < 0.05, "{deviation}");
    let above = gaps.iter().filter(|gap| **gap > mean).count() as f64 / 20_000.0;
    assert!((above - 0.3679).abs() < 0.02, "{above}");
    let mut at_once = Arrivals::new(f64::INFINITY, 7, start);
    assert!((0..10).all(|_| at_once.next() == start));
}

#[test]
fn addresses_that_cannot_be_used_are_named() {
    for wrong in ["", "127.0.0.1:8000", "https://example.org", "http://"] {
        assert!(
            matches!(Client::new(wrong, None), Err(ClientError::Address(_))),
            "{wrong}"
        );
    }
    assert!(Client::new("http://localhost:1/prefix/", Some("key")).is_ok());
}

#[tokio::test]
async fn a_server_that_is_not_there_is_an_error() {
    let client = Client::new("http://127.0.0.1:1", None).unwrap();
    assert!(matches!(
        client.get("/v1/models").await,
        Err(ClientError::Connect { .. })
    ));
}
