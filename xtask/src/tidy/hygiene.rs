//! What every text file keeps to.

use super::{File, Problem};

/// Columns, in source files that rustfmt does not break.
const WIDTH: usize = 100;

pub(super) fn check(file: &File) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut offset = 0;
    for line in file.text.split_inclusive('\n') {
        let content = line.strip_suffix('\n').unwrap_or(line);
        let mut report = |rule: &str| problems.push(Problem::at(file, offset, rule));
        if content.ends_with([' ', '\t', '\r']) {
            report("white space at the end of the line");
        }
        if content.contains('\t') {
            report("a tab");
        }
        if is_cuda(&file.path) && content.chars().count() > WIDTH {
            report("longer than 100 columns");
        }
        offset += line.len();
    }
    if !file.text.is_empty() && (!file.text.ends_with('\n') || file.text.ends_with("\n\n")) {
        let rule = "a file ends with one line break";
        problems.push(Problem::at(file, file.text.len(), rule));
    }
    problems
}

fn is_cuda(path: &str) -> bool {
    [".cu", ".cuh", ".h"]
        .iter()
        .any(|extension| path.ends_with(extension))
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    fn rules(path: &str, text: &str) -> Vec<String> {
        check(&file(path, text))
            .into_iter()
            .map(|problem| problem.to_string())
            .collect()
    }

    #[test]
    fn clean_files_pass() {
        assert_eq!(rules("a.rs", "fn a() {}\n"), [""; 0]);
        assert_eq!(rules("a.rs", ""), [""; 0]);
        assert_eq!(rules("a.md", &format!("{}\n", "x".repeat(200))), [""; 0]);
    }

    #[test]
    fn each_rule_is_found_on_its_line() {
        assert_eq!(
            rules("a.rs", "x\ny \n"),
            ["a.rs:2: white space at the end of the line"]
        );
        assert_eq!(rules("a.rs", "x\n\ty\n"), ["a.rs:2: a tab"]);
        assert_eq!(
            rules("a.rs", "x"),
            ["a.rs:1: a file ends with one line break"]
        );
        assert_eq!(
            rules("a.rs", "x\n\n"),
            ["a.rs:3: a file ends with one line break"]
        );
        assert_eq!(
            rules("a.cu", &format!("{}\n", "x".repeat(101))),
            ["a.cu:1: longer than 100 columns"]
        );
    }
}
