//! The exchange of threads: the good case, and every way in which one thread can spoil it.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use ep_peers::Error;
use ep_peers::exchange::local::{Local, local};
use ep_peers::exchange::{Cause, Exchange, Fault, MAX_RECORD_BYTES, Step};

const STEP: Step = Step::new("handles");
const PATIENCE: Duration = Duration::from_millis(400);

/// Runs a group in threads; what each rank returns, by rank.
fn group<T: Send>(size: u32, part: impl Fn(Local) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let threads: Vec<_> = local(size)
            .into_iter()
            .map(|member| scope.spawn(|| part(member)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// The faults of ranks 0 to 2 when rank 3 does something else.
fn faults_of_others(bad: impl Fn(Local) + Sync) -> Vec<Fault> {
    let outcomes = group(4, |member| {
        if member.rank() == 3 {
            bad(member);
            return None;
        }
        let begun = Instant::now();
        let outcome = member.all_gather(STEP, &[1; 8], begun + PATIENCE);
        assert!(begun.elapsed() < PATIENCE * 2);
        let repeated = member.barrier(Step::new("after"), Instant::now() + PATIENCE);
        match (outcome, repeated) {
            (Err(Error::Exchange(fault)), Err(Error::Exchange(again))) => {
                assert_eq!(fault, again, "a broken group stays broken");
                Some(fault)
            }
            outcome => panic!("{outcome:?}"),
        }
    });
    outcomes.into_iter().flatten().collect()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

#[test]
fn threads_exchange_records() {
    for size in [1, 2, 8, 72] {
        group(size, |member| {
            for turn in 0..20_u32 {
                let record = |rank: u32| (rank * 1000 + turn).to_le_bytes().to_vec();
                let records = member
                    .all_gather(STEP, &record(member.rank()), soon())
                    .unwrap();
                assert!(records.into_iter().eq((0..size).map(record)));
                member.barrier(Step::new("turn"), soon()).unwrap();
            }
            // Leaving right after the last step must not spoil it for those that still wake up.
        });
    }
}

#[test]
fn a_thread_that_never_comes_is_named() {
    let faults = faults_of_others(|member| {
        thread::sleep(PATIENCE * 2);
        let late = member.all_gather(STEP, &[1; 8], soon());
        assert!(matches!(late, Err(Error::Exchange(fault)) if fault.ranks == [3]));
    });
    for fault in faults {
        assert_eq!((fault.step, fault.ranks.as_slice()), (STEP, [3].as_slice()));
        assert!(matches!(fault.cause, Cause::Missing { waited } if waited >= PATIENCE / 2));
    }
}

#[test]
fn a_thread_that_leaves_is_named_at_once() {
    let begun = Instant::now();
    for fault in faults_of_others(|_| thread::sleep(Duration::from_millis(20))) {
        assert_eq!(
            fault,
            Fault {
                step: STEP,
                ranks: vec![3],
                cause: Cause::Lost { errno: None },
            }
        );
    }
    assert!(begun.elapsed() < PATIENCE);
}

#[test]
fn a_thread_that_panics_is_named() {
    let members = local(2);
    let [first, second]: [Local; 2] = members.try_into().unwrap();
    let panicking = thread::spawn(move || {
        let _held = second;
        std::panic::resume_unwind(Box::new(()));
    });
    assert!(panicking.join().is_err());
    assert!(matches!(
        first.barrier(STEP, soon()),
        Err(Error::Exchange(Fault { ranks, .. })) if ranks == [1]
    ));
}

#[test]
fn another_size_of_record_is_named() {
    let faults = faults_of_others(|member| {
        assert!(member.all_gather(STEP, &[1; 9], soon()).is_err());
    });
    for fault in faults {
        assert_eq!(fault.ranks, [3]);
        assert_eq!(
            fault.cause,
            Cause::Size {
                expected: 8,
                actual: 9
            }
        );
    }
}

#[test]
fn another_step_is_named() {
    let at = Step::new("teardown");
    let faults = faults_of_others(|member| {
        assert!(member.all_gather(at, &[1; 8], soon()).is_err());
    });
    for fault in faults {
        assert_eq!(
            (fault.ranks.as_slice(), fault.cause),
            ([3].as_slice(), Cause::Step { at })
        );
    }
}

#[test]
fn a_record_too_large_is_refused_before_anyone_is_told() {
    let outcomes = group(2, |member| {
        let large = vec![0; MAX_RECORD_BYTES + 1];
        let refused = member.all_gather(STEP, &large, soon());
        assert!(
            matches!(refused, Err(Error::RecordTooLarge { bytes, .. }) if bytes == large.len())
        );
        member.barrier(STEP, soon())
    });
    assert!(outcomes.iter().all(Result::is_ok));
}

#[test]
fn two_threads_cannot_speak_for_one_rank() {
    let [first, second]: [Local; 2] = local(2).try_into().unwrap();
    let (tell, hear) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..2 {
            let (tell, first) = (tell.clone(), &first);
            scope.spawn(move || tell.send(first.barrier(STEP, soon())).unwrap());
        }
        // Whichever came second is turned away at once; the other waits for rank 1.
        assert!(matches!(hear.recv().unwrap(), Err(Error::Busy { .. })));
        second.barrier(STEP, soon()).unwrap();
        assert!(hear.recv().unwrap().is_ok());
    });
}
