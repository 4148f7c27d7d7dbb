//! Inputs that fuzzing began with or found: what must hold for any bytes holds for these.

use std::io;
use std::path::Path;

use lapidary_tests::fuzz::TARGETS;

#[test]
fn seeds_of_the_fuzz_targets_keep_what_is_promised() -> io::Result<()> {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    for (target, run) in TARGETS {
        let mut num_seeds = 0;
        for seed in std::fs::read_dir(seeds.join(target))? {
            let path = seed?.path();
            // Shown when one fails.
            println!("{}", path.display());
            run(&std::fs::read(path)?);
            num_seeds += 1;
        }
        assert!(num_seeds > 3, "{target} has no seeds");
    }
    Ok(())
}
