//! Prose that can be read: no line of a comment, or of a page, has more than 100 columns. Tables,
//! pictures and what a program printed stand as they are. (Code has its own width, in
//! rustfmt.toml.)

use std::fs;
use std::path::{Path, PathBuf};

const COLUMNS: usize = 100;

#[test]
fn no_line_of_prose_is_longer_than_a_hundred_columns() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for directory in ["src", "tests", "tools", "docs"] {
        files_in(&root.join(directory), &mut files);
    }
    for entry in fs::read_dir(root).expect("the package has a directory") {
        files.push(entry.expect("it can be listed").path());
    }
    let mut seen = 0;
    let mut long = Vec::new();
    for file in files {
        let kind = file.extension().and_then(|extension| extension.to_str());
        let prose: fn(&str) -> Option<&str> = match kind {
            Some("md") => |line| Some(line),
            Some("rs") => comment,
            _ => continue,
        };
        seen += 1;
        let text = fs::read_to_string(&file).expect("it is UTF-8");
        long.extend(too_long(&text, prose).map(|at| format!("{}:{at}", file.display())));
    }
    assert!(seen > 200, "only {seen} files were found: the scan looks in the wrong place");
    assert!(long.is_empty(), "more than {COLUMNS} columns:\n{}", long.join("\n"));
}

#[test]
fn tables_pictures_and_code_may_be_as_wide_as_they_are() {
    let wide = "x".repeat(COLUMNS + 1);
    let lines =
        |text: &str, prose: fn(&str) -> Option<&str>| too_long(text, prose).collect::<Vec<_>>();
    let page = format!("{wide}\n| {wide} |\n    {wide}\n```\n{wide}\n```\n- {wide}\n");
    assert_eq!(lines(&page, |line| Some(line)), [1, 7]);
    let code =
        format!("/// {wide}\n//!     {wide}\nlet a = \"{wide}\";\n    // {wide}\n/// | {wide} |\n");
    assert_eq!(lines(&code, comment), [1, 4]);
}

/// The numbers of the lines, from 1, that are prose and too long.
fn too_long(text: &str, prose: fn(&str) -> Option<&str>) -> impl Iterator<Item = usize> + '_ {
    let mut is_fenced = false;
    text.lines().enumerate().filter_map(move |(n, line)| {
        let words = prose(line)?;
        if words.trim_start().starts_with("```") {
            is_fenced = !is_fenced;
        }
        let is_picture =
            is_fenced || words.starts_with("    ") || words.trim_start().starts_with('|');
        (!is_picture && line.chars().count() > COLUMNS).then_some(n + 1)
    })
}

/// What a line of Rust says as a comment, if it is one and nothing else.
fn comment(line: &str) -> Option<&str> {
    let text = line.trim_start().strip_prefix("//")?;
    let text = text.strip_prefix(['/', '!']).unwrap_or(text);
    Some(text.strip_prefix(' ').unwrap_or(text))
}

fn files_in(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("it is a directory") {
        let path = entry.expect("it can be listed").path();
        match path.is_dir() {
            true => files_in(&path, files),
            false => files.push(path),
        }
    }
}
