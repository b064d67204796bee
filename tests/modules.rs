//! Which module may import which: the pure part of the library knows nothing of the edges.
//!
//! The protocol is a pure state machine: time and bytes come in as arguments. That is what lets a
//! seeded simulator run the very code that the appliance runs, so it is checked here, by a scan of
//! the source text. The scan knows just enough of Rust to drop comments, literals and tests,
//! to open `use a::{b, c}`, and to follow `super`. What no table names is pure: a new module has to
//! be named as an edge here before it may touch the world.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The edges, and what is pure within them; the longest match decides.
const MODULES: &[(&str, Kind)] = &[
    ("main", Kind::Edge),
    ("config", Kind::Edge),
    ("clock", Kind::Edge),
    ("shm", Kind::Edge),
    ("ring", Kind::Edge),
    ("net", Kind::Edge),
    ("shard", Kind::Edge),
    ("demo", Kind::Edge),
    ("load", Kind::Edge),
    ("notify", Kind::Edge),
    ("appliance", Kind::Edge),
    ("restart", Kind::Edge),
    ("drain", Kind::Edge),
    ("holder", Kind::Edge),
    ("doorbell", Kind::Edge),
    ("feed", Kind::Edge),
    ("membership", Kind::Edge),
    ("logging", Kind::Edge),
    ("conntrack", Kind::Edge),
    ("conntrack::codec", Kind::Pure),
    ("conntrack::local", Kind::Pure),
    // What is named here only so that it cannot become an edge by an entry above.
    ("limits", Kind::Pure),
    ("time", Kind::Pure),
    ("seq", Kind::Pure),
    ("counters", Kind::Pure),
    ("memory", Kind::Pure),
    ("word", Kind::Pure),
    ("few", Kind::Pure),
    ("pace", Kind::Pure),
    ("rules", Kind::Pure),
    ("source", Kind::Pure),
    ("kill", Kind::Pure),
    ("prefetch", Kind::Pure),
    ("conn", Kind::Pure),
    ("ccp", Kind::Pure),
    ("group", Kind::Pure),
    ("sync", Kind::Pure),
];

/// Paths that the pure part may not mention, nor anything below them.
const FORBIDDEN_PATHS: &[&str] = &[
    "std::fs",
    "std::io",
    "std::os",
    "std::env",
    "std::thread",
    "std::process",
    "std::net::UdpSocket",
    "std::net::TcpStream",
    "std::net::TcpListener",
    "std::time::Instant",
    "std::time::SystemTime",
    "libc",
    "io_uring",
    "memmap2",
];

/// Words that the pure part may not contain, in whatever way they were imported.
const FORBIDDEN_WORDS: &[&str] = &["unsafe", "Instant", "SystemTime", "UdpSocket"];

/// The one exception: a file and the word that it may contain.
const EXCEPTION: (&str, &str) = ("prefetch", "unsafe");

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Pure,
    Edge,
}

fn kind_of(module: &str) -> Kind {
    let matching = MODULES.iter().filter(|(name, _)| is_within(module, name));
    matching.max_by_key(|(name, _)| name.len()).map_or(Kind::Pure, |(_, kind)| *kind)
}

fn is_within(path: &str, ancestor: &str) -> bool {
    path.strip_prefix(ancestor).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

#[test]
fn the_pure_part_knows_nothing_of_the_edges() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut pure = 0;
    let mut violations = Vec::new();
    for file in rust_files(&source) {
        let module = module_of(file.strip_prefix(&source).expect("it was found below src"));
        // The root declares every module and holds no code.
        if module.is_empty() || kind_of(&module) == Kind::Edge {
            continue;
        }
        pure += 1;
        let text = std::fs::read_to_string(&file).expect("source files are readable UTF-8");
        let found = violations_in(&module, &text);
        violations.extend(found.into_iter().map(|what| format!("{}: {what}", file.display())));
    }
    assert!(pure >= 10, "only {pure} pure files were found: the scan looks in the wrong place");
    assert!(
        violations.is_empty(),
        "the pure part mentions what it may not; an edge has to be named in tests/modules.rs:\n{}",
        violations.join("\n")
    );
}

#[test]
fn imports_run_in_no_circle() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut texts = BTreeMap::new();
    for file in rust_files(&source) {
        let module = module_of(file.strip_prefix(&source).expect("it was found below src"));
        texts.insert(
            module,
            std::fs::read_to_string(&file).expect("source files are readable UTF-8"),
        );
    }
    // The root declares every module and holds no code.
    texts.remove("");
    assert!(
        texts.len() >= 80,
        "only {} files were found: the scan looks in the wrong place",
        texts.len()
    );
    assert_eq!(circle_in(&texts), None);
}

/// A slot's kind, its other copy's place and its life decide in which list it stands and what adds
/// it up.
#[test]
fn only_the_ledger_changes_what_a_slot_is() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/sync");
    let mut found = BTreeMap::new();
    for file in rust_files(&source) {
        let text = std::fs::read_to_string(&file).expect("source files are readable UTF-8");
        let tokens = without_tests(tokens_of(&text));
        let setters = ["set_kind", "set_peer", "set_generation"];
        let count = tokens.iter().filter(|token| setters.contains(&token.as_str())).count();
        if count > 0 {
            found.insert(file.file_name().expect("it is a file").to_owned(), count);
        }
    }
    assert_eq!(found.keys().collect::<Vec<_>>(), ["ledger.rs"], "{found:?}");
}

#[test]
fn the_scan_for_circles_follows_what_a_module_hands_on() {
    let texts =
        |of: &[(&str, &str)]| of.iter().map(|(m, t)| ((*m).to_owned(), (*t).to_owned())).collect();
    let straight = texts(&[
        ("a", "pub use b::B; mod b; mod c;"),
        ("a::b", "use crate::d::D; pub struct B;"),
        ("a::c", "use crate::a::B; use super::b::B; #[cfg(test)] mod tests { use crate::e::E; }"),
        ("d", "pub struct D;"),
        ("e", "use crate::a::c::C; fn f() { crate::d::g() }"),
    ]);
    assert_eq!(circle_in(&straight), None);
    let circle = texts(&[
        ("a", "pub use b::B;"),
        ("a::b", "fn f() { crate::d::g() }"),
        ("d", "use crate::e::{F, E};"),
        ("e", "use crate::a::B;"),
    ]);
    assert_eq!(circle_in(&circle).as_deref(), Some("a::b -> d -> e -> a::b"));
}

/// The first circle among the files of these modules: each takes something from the next.
fn circle_in(texts: &BTreeMap<String, String>) -> Option<String> {
    let mut edges: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (module, text) in texts {
        let taken = paths_of(&without_exports(without_tests(tokens_of(text)))).into_iter();
        let from = taken.filter_map(|path| file_of(texts, module, &path));
        edges.insert(module, from.filter(|other| *other != module).collect());
    }
    // What takes from nobody is in no circle, nor what takes only from such; what is left is in
    // one, or leads to one.
    loop {
        let done: Vec<&str> =
            edges.iter().filter(|(_, from)| from.is_empty()).map(|(m, _)| *m).collect();
        if done.is_empty() {
            break;
        }
        edges.retain(|module, _| !done.contains(module));
        edges.values_mut().for_each(|from| from.retain(|other| !done.contains(other)));
    }
    let mut way = vec![*edges.keys().next()?];
    loop {
        let next = *edges[way.last()?].first()?;
        if let Some(at) = way.iter().position(|module| *module == next) {
            way.push(next);
            return Some(way[at..].join(" -> "));
        }
        way.push(next);
    }
}

/// Drops every `pub use`: what a module hands on it does not take for itself.
fn without_exports(tokens: Vec<String>) -> Vec<String> {
    let mut kept = Vec::new();
    let mut rest = tokens.into_iter().peekable();
    while let Some(token) = rest.next() {
        if token == "use" && kept.last().is_some_and(|last| last == "pub" || last == ")") {
            rest.by_ref().take_while(|token| token != ";").for_each(drop);
        } else {
            kept.push(token);
        }
    }
    kept
}

/// The module whose file has what this path names in this module: itself, or what a module hands on
/// with `pub use`.
fn file_of<'t>(texts: &'t BTreeMap<String, String>, module: &str, path: &str) -> Option<&'t str> {
    let path = absolute(module, path);
    let inner =
        path.strip_prefix("crate::").map_or_else(|| format!("{module}::{path}"), str::to_owned);
    let parts: Vec<&str> = inner.split("::").collect();
    let is_module = |count: &usize| texts.contains_key(&parts[..*count].join("::"));
    let count = (1..=parts.len()).rev().find(is_module)?;
    let (owner, text) = texts.get_key_value(&parts[..count].join("::"))?;
    // (A relative path names a module only below the one that it stands in.)
    if !path.starts_with("crate::") && owner == module {
        return None;
    }
    let name = parts.get(count)?;
    let handed_on = paths_of(&tokens_of(text)).into_iter().find_map(|path| {
        let child = path.strip_suffix(&format!("::{name}"))?;
        texts.get_key_value(&format!("{owner}::{child}")).map(|(child, _)| child.as_str())
    });
    Some(handed_on.unwrap_or(owner))
}

#[test]
fn the_scan_catches_what_it_is_made_to_catch() {
    for (module, planted) in [
        ("sync", "use crate::shm::Region;"),
        ("sync", "use crate::{\n    conn::{Tuple, slot::Slot},\n    net::{sockets},\n};"),
        ("sync::sender", "use super::super::shard;"),
        ("conntrack::codec", "use super::events::Event;"),
        ("conntrack::codec", "fn f() { crate::conntrack::commit::now(); }"),
        ("group", "use std::{time::{Duration, Instant}};"),
        ("group", "fn f() -> std::time::SystemTime { todo!() }"),
        ("group", "use std::{net, time}; fn f(s: &net::UdpSocket, t: time::Instant) {}"),
        ("ccp", "use std::io::Read;"),
        ("ccp", "fn f() { ::libc::abort() }"),
        ("ccp", "/* use */ use io_uring as ring;"),
        ("conn::slot", "fn f<'a>(p: *const u8, c: char) -> u8 { let _ = 'x'; unsafe { *p } }"),
        ("prefetch", "use std::thread;"),
        ("some_new_module", "fn f() { std::fs::read(\"\\\"\").ok(); }"),
        ("conn", "#[cfg(test)]\nmod tests { fn f() {} }\nuse crate::clock::now;"),
    ] {
        assert_eq!(violations_in(module, planted).len().min(1), 1, "missed in {module}: {planted}");
    }
}

#[test]
fn the_scan_lets_pass_what_is_allowed() {
    for (module, innocent) in [
        ("sync", "use crate::conn::{Tuple, slot::Slot};\nuse std::{sync::atomic::AtomicU64, fmt};"),
        ("sync", "//! like crate::shm, but unsafe\n/* nested /* unsafe */ std::fs */"),
        ("conntrack::codec", "const FAMILY: u8 = libc::AF_INET6 as u8;"),
        (
            "sync",
            "const TEXT: &str = \"unsafe \\\" std::fs\"; const RAW: &str = r#\"unsafe \" libc\"#;",
        ),
        ("sync", "#[allow(unsafe_code)] fn catalog(network: u8, ring_size: u8) {}"),
        ("sync", "#[cfg(test)]\nmod tests {\n    use std::thread;\n    fn f() { let _ = '{'; }\n}"),
        (
            "sync",
            "use std::net::{IpAddr, Ipv4Addr}; use std::time::Duration; use crate::time::Time;",
        ),
        ("prefetch", "unsafe { hint() }"),
        ("conntrack::codec", "use crate::conntrack::codec::nested; use super::codec::Attribute;"),
        ("group::view", "use super::detector; use self::inner::shm;"),
    ] {
        assert_eq!(
            violations_in(module, innocent),
            Vec::<String>::new(),
            "in {module}: {innocent}"
        );
    }
}

/// What a pure module's text mentions and may not.
fn violations_in(module: &str, text: &str) -> Vec<String> {
    let tokens = without_tests(tokens_of(text));
    let mut violations = Vec::new();
    for word in FORBIDDEN_WORDS {
        if EXCEPTION != (module, *word) && tokens.iter().any(|token| token == word) {
            violations.push((*word).to_owned());
        }
    }
    for path in paths_of(&tokens) {
        let path = absolute(module, &path);
        let edge = path.strip_prefix("crate::").is_some_and(|inner| kind_of(inner) == Kind::Edge);
        // A number of the kernel's interface is no dependency on the kernel.
        let constant = path
            .strip_prefix("libc::")
            .is_some_and(|name| !name.contains(|c: char| c.is_lowercase()));
        if constant {
            continue;
        }
        if edge || FORBIDDEN_PATHS.iter().any(|forbidden| is_within(&path, forbidden)) {
            violations.push(path);
        }
    }
    violations
}

/// A path with `super` and `self` resolved, as far as the file's own module goes.
fn absolute(module: &str, path: &str) -> String {
    let mut parts: Vec<&str> = path.split("::").filter(|part| !part.is_empty()).collect();
    if !matches!(parts.first(), Some(&"super" | &"self")) {
        return parts.join("::");
    }
    let mut base: Vec<&str> = module.split("::").collect();
    while matches!(parts.first(), Some(&"super" | &"self")) {
        if parts.remove(0) == "super" {
            base.pop();
        }
    }
    ["crate"].into_iter().chain(base).chain(parts).collect::<Vec<_>>().join("::")
}

/// Every path in the text, one for each leaf of a `use a::{b, c::d}`.
fn paths_of(tokens: &[String]) -> Vec<String> {
    let mut paths = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if is_word(&tokens[at]) || tokens[at] == "::" {
            at = read_path(tokens, at, "", &mut paths);
        } else {
            at += 1;
        }
    }
    paths
}

/// Reads one path from `at`, with the groups in it, and returns where it ends.
fn read_path(tokens: &[String], mut at: usize, prefix: &str, paths: &mut Vec<String>) -> usize {
    let mut path = prefix.to_owned();
    while at < tokens.len() && (is_word(&tokens[at]) || tokens[at] == "::") {
        path.push_str(&tokens[at]);
        at += 1;
        // Two words in a row (`use a`, `pub fn`) are two paths.
        if path.ends_with("::") && tokens.get(at).is_some_and(|next| next == "{") {
            at += 1;
            while at < tokens.len() && tokens[at] != "}" {
                at = match read_path(tokens, at, &path, paths) {
                    end if end == at => at + 1,
                    end => end,
                };
            }
            return at + 1;
        }
        if !path.ends_with("::") && tokens.get(at).is_none_or(|next| next != "::") {
            break;
        }
    }
    if path != prefix {
        paths.push(path);
    }
    at
}

fn is_word(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphanumeric() || c == '_')
}

/// Drops every item behind `#[cfg(test)]`.
fn without_tests(tokens: Vec<String>) -> Vec<String> {
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if tokens[at..]
            .iter()
            .map(String::as_str)
            .take(7)
            .eq(["#", "[", "cfg", "(", "test", ")", "]"])
        {
            at += 7;
            let mut depth = 0;
            while at < tokens.len() {
                depth += i32::from(tokens[at] == "{") - i32::from(tokens[at] == "}");
                at += 1;
                if depth == 0 && (tokens[at - 1] == "}" || tokens[at - 1] == ";") {
                    break;
                }
            }
        } else {
            kept.push(tokens[at].clone());
            at += 1;
        }
    }
    kept
}

/// Words, `::`, and other characters one by one; comments and literals are left out.
fn tokens_of(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let Some(length) = raw_string(rest) {
            length
        } else if first == '"' {
            quoted(rest, '"').unwrap_or(rest.len())
        } else if first == '\'' {
            // A lifetime has no closing quote behind one character: then only the quote goes.
            let is_char = rest[1..].starts_with('\\') || rest.chars().nth(2) == Some('\'');
            if is_char { quoted(rest, '\'').unwrap_or(1) } else { 1 }
        } else if is_word(rest) {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            tokens.push(rest[..end].to_owned());
            end
        } else if rest.starts_with("::") {
            tokens.push("::".to_owned());
            2
        } else {
            if !first.is_whitespace() {
                tokens.push(first.to_string());
            }
            first.len_utf8()
        };
        rest = &rest[length..];
    }
    tokens
}

fn block_comment(text: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < text.len() {
        let rest = &text.as_bytes()[at..];
        match rest {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn raw_string(text: &str) -> Option<usize> {
    let inner = text.strip_prefix("br").or_else(|| text.strip_prefix('r'))?;
    let hashes = inner.find(|c| c != '#')?;
    inner[hashes..].strip_prefix('"')?;
    let open = text.len() - inner.len() + hashes + 1;
    let close = format!("\"{}", "#".repeat(hashes));
    Some(text[open..].find(&close).map_or(text.len(), |end| open + end + close.len()))
}

fn quoted(text: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if c == quote && !escaped {
            return Some(at + 1);
        }
        escaped = c == '\\' && !escaped;
    }
    None
}

/// `conn/slot.rs` is `conn::slot`, `conn/mod.rs` is `conn`, `lib.rs` is the root.
fn module_of(file: &Path) -> String {
    let path = file.with_extension("");
    let parts = path.iter().map(|part| part.to_str().expect("source files have plain names"));
    let parts: Vec<&str> = parts.filter(|part| !matches!(*part, "mod" | "lib")).collect();
    parts.join("::")
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).expect("src is a directory") {
        let path = entry.expect("src can be listed").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}
