//! What a token costs from the executor to a task that awaits it: 256 streams at once, with an executor that takes no
//! time. `cargo bench -p lapidary-engine --features testing --bench streams`

use std::convert::Infallible;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lapidary_engine::{Engine, EngineConfig, EngineHandle, KvCacheConfig, Request, ScriptedConfig, ScriptedExecutor};
use tokio::runtime;

const NUM_STREAMS: u32 = 256;
const NUM_TOKENS: u32 = 200;

async fn serve(engine: &EngineHandle) {
    let tasks: Vec<_> = (0..NUM_STREAMS)
        .map(|n| {
            let request = Request::for_test(vec![n; 32], NUM_TOKENS);
            let mut stream = engine.submit(request).expect("the queue holds all of them");
            tokio::spawn(async move {
                let mut num_tokens = 0;
                while let Some(event) = stream.recv().await {
                    event.expect("nothing fails");
                    num_tokens += 1;
                }
                assert_eq!(num_tokens, NUM_TOKENS);
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("no task panics");
    }
}

fn streams(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("streams");
    group.throughput(Throughput::Elements(u64::from(NUM_STREAMS * NUM_TOKENS)));
    for max_steps_in_flight in [1, 2] {
        let config = ScriptedConfig {
            kv_cache: KvCacheConfig {
                num_blocks: 8192,
                block_size: 16,
            },
            max_steps_in_flight,
            is_cheap: true,
            ..ScriptedConfig::default()
        };
        let build = move || Ok::<_, Infallible>(ScriptedExecutor::new(config));
        let engine = Engine::spawn(EngineConfig::default(), build).expect("nothing to fail");
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .build()
            .expect("one more thread");
        group.bench_function(format!("256x200/{max_steps_in_flight}_in_flight"), |bencher| {
            bencher.iter(|| runtime.block_on(serve(&engine)));
        });
        engine.shutdown();
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = streams
}
criterion_main!(benches);
