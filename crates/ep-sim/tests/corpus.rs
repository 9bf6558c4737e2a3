//! The corpus of the fuzz target for cluster files, replayed. `fuzz/README.md` says how it is made.

#[path = "../../../fuzz/properties/cluster.rs"]
mod cluster;
#[path = "../../../fuzz/replay.rs"]
mod replay;

const CORPUS: &str = "fuzz/corpus/cluster";

/// What a cluster file is made of.
const WORDS: [&[u8]; 24] = [
    b"[[node]]\n",
    b"[node.gpu]\n",
    b"name = \"a\"\n",
    b"gpus = 1024\n",
    b"gpus = 4000000000\n",
    b"nics = 4294967295\n",
    b"gpu = { clique_id = 1 }\n",
    b"imex_channel = true\n",
    b"peer_access = \"none\"\n",
    b"cluster_uuid",
    b"\"\"\"",
    b"'''",
    b"\n",
    b"\r\n",
    b"\\u0041",
    b"\"",
    b"=",
    b".",
    b"{",
    b"}",
    b"[",
    b"0x",
    b"-1",
    "\u{feff}é".as_bytes(),
];

/// Every key of the format.
const FULL: &str = r#"[[node]]
name = "n0"
imex_channel = true
nics = 2
ipc_namespace = "private"
gpus = 4
[node.gpu]
fabric_attribute = false
posix_fd_attribute = false
fabric_state = "in-progress"
fabric_status = 3
cluster_uuid = "6b1f0c3e-0000-4000-8000-000000000001"
clique_id = 1
create_fabric = 0
import_fabric = 999
peer_access = "none"
"#;

/// Values of every kind that TOML has, none of which a cluster file takes.
const TOML: &str = r#"# "all" of [TOML]
title = "\b\t\n\f\r\e\"\\ \x41 \u00e9 \U0001f600"
literal = 'C:\n0'
folded = """\
   one \
   ""two"" """
raw = '''
'three' '''
numbers = [ +1, -1_0, 0xdead_BEEF, 0o17, 0b1_1, 1.5, -2e+3, 6.02_2E23, inf, -nan, 1e9999 ]
dates = [ 1979-05-27T07:32:00Z, 1979-05-27 00:32:00.999999-07:00, 1979-05-27, 07:32:00, 07:32 ]
flags = [ true, false, ] # the last comma
"quoted key".'and another' . bare-1_2 = { a.b = {}, "c" = [ [ ], [{}] ], }
[a . "b".c]
[[a.b.d]]
[[a.b.d]]
x = 1
"#;

fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let nested = format!("node = {}", "[".repeat(200));
    let many = "[[node]]\nname = \"a\"\ngpus = 1024\n".repeat(16);
    let seeds = [
        ("every-key", FULL),
        ("every-key-crlf", &FULL.replace('\n', "\r\n")),
        ("byte-order-mark", &format!("\u{feff}{FULL}")),
        ("cut-in-a-string", &FULL[..FULL.len() - 4]),
        ("empty", ""),
        ("no-nodes", "node = []\n"),
        ("inline", "node = [{ name = \"n0\", gpus = 8, gpu = {} }]\n"),
        (
            "inline-lines",
            "node = [\n  { name = \"n0\", gpus = 8 },\n  { name = 3 },\n]\n",
        ),
        (
            "dotted",
            "[[node]]\nname = \"a\"\ngpus = 1\ngpu.clique_id = 7\n",
        ),
        ("dotted-root", "node.name = \"a\"\nnode.gpus = 1\n"),
        (
            "escaped-key",
            "[[\"no\\u0064e\"]]\n\"n\\u0061me\" = \"a\"\ngpus = 1\n",
        ),
        (
            "radixes",
            "[[node]]\nname = \"a\"\ngpus = 0x1_0\nnics = +0\n",
        ),
        ("no-gpus", "[[node]]\nname = \"a\"\ngpus = 0\n"),
        ("negative", "[[node]]\nname = \"a\"\ngpus = -1\n"),
        (
            "too-many-gpus",
            "[[node]]\nname = \"a\"\ngpus = 4000000000\n",
        ),
        (
            "beyond-64-bits",
            "[[node]]\nname = \"a\"\ngpus = 99999999999999999999\n",
        ),
        ("a-gpu-too-many", "[[node]]\nname = \"a\"\ngpus = 1025\n"),
        ("large-nodes", &many),
        ("toml", TOML),
        ("toml-cut-in-a-date", &TOML[..TOML.find("-27").unwrap()]),
        (
            "toml-redefined",
            &format!("{TOML}[a.b]\n[a.b]\n[[a.b]]\na.b.d.x = 1\n"),
        ),
        (
            "bad-values",
            "a = 01\nb = 0x\nc = 1__0\nd = 1979-13-27\ne = \"\\q\"\nf = tru\ng\n= 1",
        ),
        ("nameless", "[[node]]\nname = \"\"\ngpus = 1\n"),
        ("without-gpus", "[[node]]\nname = \"a\"\n\n[[node]]\n"),
        (
            "unknown-keys",
            "[[node]]\nname = \"a\"\nzeta = 1\nalpha = 1\n",
        ),
        (
            "unknown-gpu-key",
            "[[node]]\nname = \"a\"\ngpus = 1\n[node.gpu]\nx.y = 1\n",
        ),
        ("unknown-root-key", "title = \"a\"\n"),
        // Once passed on to the terminal.
        ("regression-control-in-key", "\"\\u001b[31m\\n\" = 1\n"),
        ("twice", "[[node]]\nname = \"a\"\nname = \"b\"\n"),
        ("node-is-a-table", "[node]\nname = \"a\"\ngpus = 1\n"),
        ("node-is-a-number", "\nnode = 4\n"),
        ("nodes-are-numbers", "node = [\n1]\n"),
        (
            "gpu-is-a-list",
            "[[node]]\nname = \"a\"\ngpus = 1\n[[node.gpu]]\n",
        ),
        (
            "wrong-types",
            "[[node]]\nname = \"a\"\ngpus = 1\nimex_channel = 1\nnics = 1.5\n",
        ),
        (
            "bad-uuid",
            "[[node]]\nname = \"a\"\ngpus = 1\ngpu = { cluster_uuid = \"é\" }\n",
        ),
        (
            "bad-state",
            "[[node]]\nname = \"a\"\ngpus = 1\ngpu = { fabric_state = \"\" }\n",
        ),
        ("syntax", "[[node]]\nname = \"a\"\ngpus = = 1\n"),
        ("nested", &nested),
        ("nul", "[[node]]\nname = \"\0\"\n"),
    ];
    let seeds = seeds.map(|(name, text)| (name, text.as_bytes().to_vec()));
    let mut seeds = Vec::from(seeds);
    seeds.push((
        "not-utf-8",
        b"[[node]]\nname = \"\xff\xc3\"\ngpus = 1\n".to_vec(),
    ));
    seeds
}

#[test]
fn the_cluster_corpus_holds() {
    replay::seeds(CORPUS, &seeds());
    replay::replay(&[CORPUS, "clusters"], 100, &WORDS, cluster::check);
}
