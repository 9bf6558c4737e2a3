//! Replays a corpus without a fuzzer: every input as it is, and mutations of each, the same in every
//! run. Included by tests of the crates whose parsers are fuzzed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

/// A corpus is for quick replays; what a long run finds goes elsewhere.
const MAX_INPUTS: usize = 64;
const MAX_BYTES: usize = 64 << 10;

/// Asks `property` of every input in these folders of the repository, and of `mutants` mutations of
/// each. `words` are what mutations may insert.
pub(crate) fn replay(folders: &[&str], mutants: usize, words: &[&[u8]], property: impl Fn(&[u8])) {
    let inputs: BTreeMap<_, _> = folders.iter().flat_map(|folder| inputs(folder)).collect();
    let bytes: usize = inputs.values().map(Vec::len).sum();
    assert!(
        inputs.len() <= MAX_INPUTS && bytes <= MAX_BYTES,
        "{} inputs of {bytes} bytes: keep {folders:?} small",
        inputs.len()
    );
    let all: Vec<_> = inputs.values().collect();
    let mut cases = 0;
    for (name, input) in &inputs {
        let mut ask = |case: Case<'_>| {
            property(case.bytes);
            cases += 1;
        };
        ask(Case {
            name,
            mutant: None,
            bytes: input,
        });
        // Seeded by the name, so that a new input leaves the others' mutations as they are.
        let mut random = Random::seeded(name);
        for mutant in 0..mutants {
            let other = all[random.below(all.len())];
            let bytes = mutate(input, other, words, &mut random);
            ask(Case {
                name,
                mutant: Some(mutant),
                bytes: &bytes,
            });
        }
    }
    println!("{folders:?}: {cases} cases from {} inputs", inputs.len());
}

/// Asks that the folder has exactly these inputs, beside what fuzzing added under other names. Writes
/// them where `UPDATE_EXPECT` is set, and otherwise fails for one that differs.
pub(crate) fn seeds(folder: &str, seeds: &[(&str, Vec<u8>)]) {
    let folder = path(folder);
    let update = std::env::var_os("UPDATE_EXPECT").is_some();
    for (name, bytes) in seeds {
        let path = folder.join(name);
        if update {
            fs::create_dir_all(&folder).unwrap();
            fs::write(&path, bytes).unwrap();
        }
        assert!(
            fs::read(&path).is_ok_and(|found| found == *bytes),
            "{} is not what this test makes; if the format has changed, run it with UPDATE_EXPECT=1",
            path.display()
        );
    }
}

fn path(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(folder)
}

/// The files of a folder, by path.
fn inputs(folder: &str) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(path(folder)).unwrap_or_else(|error| panic!("{folder}: {error}"));
    let inputs: BTreeMap<_, _> = entries
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let input = fs::read(entry.path()).unwrap();
            (format!("{folder}/{name}"), input)
        })
        .collect();
    assert!(!inputs.is_empty(), "{folder} is empty");
    inputs
}

/// Says which case it was if the property fails.
struct Case<'a> {
    name: &'a str,
    /// None for the input itself.
    mutant: Option<usize>,
    bytes: &'a [u8],
}

impl Drop for Case<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let mutant = self.mutant.map(|n| format!(", mutant {n}"));
            eprintln!(
                "the property fails for {}{}: b\"{}\"",
                self.name,
                mutant.unwrap_or_default(),
                self.bytes.escape_ascii()
            );
        }
    }
}

fn mutate(input: &[u8], other: &[u8], words: &[&[u8]], random: &mut Random) -> Vec<u8> {
    const EDGES: [u8; 6] = [0, 1, 0x7f, 0x80, 0xfe, 0xff];

    let mut bytes = input.to_vec();
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len() + 1);
        let upto = at + random.below(bytes.len() + 1 - at);
        match random.below(8) {
            0 => bytes.truncate(at),
            1 => bytes.extend((0..random.below(9)).map(|_| random.byte())),
            2 => drop(bytes.drain(at..upto)),
            3 => bytes.extend_from_within(at..upto),
            4 => {
                let word = words[random.below(words.len())];
                bytes.splice(at..at, word.iter().copied());
            }
            // The beginning of this one and the end of another.
            5 => {
                bytes.truncate(at);
                bytes.extend(&other[random.below(other.len() + 1)..]);
            }
            change => {
                if let Some(byte) = bytes.get_mut(at) {
                    match change {
                        6 => *byte ^= 1 << random.below(8),
                        _ => *byte = EDGES[random.below(EDGES.len())],
                    }
                }
            }
        }
    }
    bytes
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn seeded(name: &str) -> Self {
        Self(
            name.bytes()
                .fold(0, |seed: u64, byte| seed.wrapping_mul(31) ^ u64::from(byte)),
        )
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound).unwrap();
        usize::try_from(self.next() % bound).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }
}
