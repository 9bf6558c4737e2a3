//! What the benchmarks share: settings, and ranks that are threads of this process.

use std::thread;
use std::time::Duration;

use criterion::Criterion;

/// Bound on every wait for other ranks: generous, because the machine may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Runs benchmarks with settings under which all of them take a few minutes. The command line may
/// say otherwise.
pub(crate) fn main(benchmarks: impl FnOnce(&mut Criterion)) {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .configure_from_args();
    benchmarks(&mut criterion);
    criterion.final_summary();
}

/// Does something as every rank, each on a thread of its own, and gives the answers by rank.
pub(crate) fn each<R, T>(
    ranks: impl IntoIterator<Item = R>,
    rank: impl Fn(R) -> Result<T, ep::Error> + Sync,
) -> Vec<T>
where
    R: Send,
    T: Send,
{
    let rank = &rank;
    thread::scope(|scope| {
        let running: Vec<_> = ranks
            .into_iter()
            .map(|mine| scope.spawn(move || rank(mine)))
            .collect();
        running
            .into_iter()
            .map(|rank| rank.join().expect("a rank panicked"))
            .map(|answer| answer.expect("a rank failed"))
            .collect()
    })
}

/// The time of repetitions that every rank has timed: each takes as long as its slowest rank.
pub(crate) fn slowest(ranks: &[Vec<Duration>]) -> Duration {
    let repetitions = ranks.first().map_or(0, Vec::len);
    (0..repetitions)
        .filter_map(|repetition| ranks.iter().map(|times| times[repetition]).max())
        .sum()
}
