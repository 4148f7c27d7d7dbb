//! More than the server can do: what it takes it answers, what it does not take it says so, and it counts both.

use std::io;
use std::time::Duration;

use lapidary_tests::churn::settled;
use lapidary_tests::load::{Clients, Shape, check_outcomes, statuses};
use lapidary_tests::process::ServerProcess;

/// Requests a second: far more than four sequences at a time can answer on most machines.
const FIRST_RATE: f64 = 400.0;
/// How often the rate is doubled until something is refused.
const MAX_DOUBLINGS: u32 = 4;
const DURATION: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread")]
async fn under_overload_every_request_is_answered_or_refused_and_counted() -> io::Result<()> {
    let server = ServerProcess::demo(&["--max-num-seqs", "4", "--max-num-queued-reqs", "8"]).await?;
    let shape = Shape {
        prompt_tokens: 24,
        answer_tokens: 64,
        leave_one_in: 7,
    };
    let before = settled(&server).await?;
    let clients = Clients::new(server.address);
    let mut all = Vec::new();
    for doublings in 0..=MAX_DOUBLINGS {
        let rate = FIRST_RATE * f64::from(1 << doublings);
        // Prompts that were seen before would be answered sooner.
        all.extend(clients.offer(shape, rate, DURATION, all.len() as u64).await?);
        if statuses(&all).contains_key(&429) {
            break;
        }
    }
    check_outcomes(&before, &settled(&server).await?, &all)?;
    assert_eq!(
        statuses(&all).into_keys().collect::<Vec<_>>(),
        [200, 429],
        "both happened"
    );
    Ok(())
}
