//! Whatever a cluster file has in it: reading it never panics; what is accepted is a cluster with a
//! place for every rank; what is refused is refused with the line, and the key where there is one.

use ep_sim::{Cluster, ClusterError, SimDriver};

/// What the format allows on one node, however large a number the file has.
const MAX_GPUS: usize = 1024;

/// The property. A file is UTF-8 before it is anything else; other bytes are replaced, because who
/// reads the file refuses them.
pub(crate) fn check(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let outcome = Cluster::from_toml(&text);
    match &outcome {
        Ok(cluster) => accepted(&text, cluster),
        Err(error) => refused(&text, error),
    }
    // A byte order mark is one at the very beginning only.
    if !text.starts_with('\u{feff}') {
        let moved = Cluster::from_toml(&format!("\n{text}"));
        assert_eq!(moved, outcome.map_err(a_line_later), "a line further down");
    }
}

fn accepted(text: &str, cluster: &Cluster) {
    assert!(!cluster.nodes.is_empty());
    // `name=""` and `gpus=1` at the least: memory is bounded by the size of the file.
    assert!(cluster.nodes.len() <= text.len() / 13, "nodes from nothing");
    let mut rank = 0;
    for (index, node) in cluster.nodes.iter().enumerate() {
        assert!(!node.name.is_empty());
        assert!((1..=MAX_GPUS).contains(&node.gpus.len()));
        for gpu in [0, node.gpus.len() - 1] {
            let number = u32::try_from(gpu).expect("at most 1024");
            assert_eq!(cluster.place(rank + gpu), Some((index, number)));
        }
        rank += node.gpus.len();
    }
    assert_eq!(cluster.ranks(), rank);
    assert_eq!(cluster.place(rank), None);
    assert!(SimDriver::for_rank(cluster, rank - 1).is_some());
    assert!(SimDriver::for_rank(cluster, rank).is_none());
}

fn refused(text: &str, error: &ClusterError) {
    let (line, key) = match error {
        ClusterError::Syntax { line, .. } => (*line, None),
        ClusterError::UnknownKey { line, key, .. } => (*line, Some(key.as_str())),
        ClusterError::MissingKey { line, key } | ClusterError::BadValue { line, key, .. } => {
            (*line, Some(*key))
        }
        ClusterError::NoNodes => return,
        other => panic!("no rule for {other:?}"),
    };
    let message = error.to_string();
    assert!(message.starts_with(&format!("line {line}: ")), "{message}");
    // It goes to a terminal and into logs, whatever the file has in its keys.
    assert!(!message.contains(char::is_control), "{message:?}");
    let lines: Vec<_> = text.split('\n').collect();
    let written = *lines.get(line.wrapping_sub(1)).expect("a line of the file");
    let Some(key) = key else { return };
    let quoted = format!("`{}`", key.escape_debug());
    assert!(message.contains(&quoted), "{message}");
    // A key in quotes can be spelled with escapes.
    if text.contains('\\') {
        return;
    }
    match error {
        // The line is the node's, which has not got the key.
        ClusterError::MissingKey { .. } => {
            assert!(
                written.contains("node") || written.contains('{'),
                "{message}: {written}"
            );
        }
        // Of a list, the line of the element.
        _ if key == "node" => {}
        _ => assert!(written.contains(key), "{message}: {written}"),
    }
}

fn a_line_later(mut error: ClusterError) -> ClusterError {
    match &mut error {
        ClusterError::Syntax { line, .. }
        | ClusterError::UnknownKey { line, .. }
        | ClusterError::MissingKey { line, .. }
        | ClusterError::BadValue { line, .. } => *line += 1,
        _ => {}
    }
    error
}
