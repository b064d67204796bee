use super::*;
use crate::conn::{State, Tuple};
use crate::conntrack::local::LocalAddresses;

fn rules(list: &[&str]) -> Rules {
    let mut rules = Rules::default();
    list.iter().for_each(|rule| rules.add(rule).expect("a rule"));
    rules
}

fn connection(original: &str) -> Connection {
    let original: Tuple = original.parse().expect("a tuple");
    Connection::new(original, original.mirrored(), State::default())
}

/// Whether a rule of this condition alone matches.
fn holds(condition: &str, original: &str) -> bool {
    rules(&[&format!("skip {condition}")]).verdict(&connection(original), None) == Verdict::Skipped
}

const WEB: &str = "tcp 10.1.2.3:1000 > 198.51.100.7:80";
const NAME: &str = "udp [2001:db8::5]:4000 > [2001:db8:1::1]:53";
const PING: &str = "icmp 10.1.2.3:53 > 10.0.0.1:2048";

#[test]
fn each_condition_looks_at_the_original_tuple() {
    for (condition, web, name, ping) in [
        ("", true, true, true),
        ("proto tcp", true, false, false),
        ("proto 17", false, true, false),
        ("proto icmp", false, false, true),
        ("proto gre", false, false, false),
        ("src 10.0.0.0/8", true, false, true),
        ("src 10.1.2.3", true, false, true),
        ("src 10.1.2.2", false, false, false),
        ("src 0.0.0.0/0", true, false, true),
        ("src ::/0", false, true, false),
        ("src 2001:db8::/32", false, true, false),
        ("dst 2001:db8::/48", false, false, false),
        ("dst 2001:db8:1::1", false, true, false),
        ("dst 198.51.100.6/31", true, false, false),
        ("dst ::ffff:198.51.100.7", false, false, false),
        ("sport 1000", true, false, false),
        ("sport 53", false, false, false),
        ("dport 53-80", true, true, false),
        ("dport 81-65535", false, false, false),
        ("dport 0-79", false, true, false),
        ("proto tcp dport 53", false, false, false),
        ("dport 80 src 10.0.0.0/8 proto tcp", true, false, false),
        ("zone 0", true, true, true),
        ("zone 5", false, false, false),
        ("local", false, false, false),
        ("address lan0", false, false, false),
    ] {
        let got = (holds(condition, WEB), holds(condition, NAME), holds(condition, PING));
        assert_eq!(got, (web, name, ping), "{condition}");
    }
    assert!(holds("zone 5", "tcp 10.1.2.3:1000 > 198.51.100.7:80 zone 5"));
}

#[test]
fn a_mark_is_compared_as_far_as_its_mask_goes() {
    let mut marked = connection(WEB);
    for (condition, mark, is_match) in [
        ("mark 0", 0, true),
        ("mark 16", 0x10, true),
        ("mark 0x10", 0x11, false),
        ("mark 0x10/0xf0", 0x11, true),
        ("mark 0x10/0xf0", 0x21, false),
        ("mark 0/0xf0", 0xffff_ff0f, true),
        ("mark 0xffffffff", u32::MAX, true),
    ] {
        marked.state.mark = mark;
        let rules = rules(&["copy zone 9", &format!("skip {condition}")]);
        assert!(rules.uses_mark() && !rules.uses_addresses());
        assert_eq!(
            rules.verdict(&marked, None) == Verdict::Skipped,
            is_match,
            "{condition} {mark:#x}"
        );
    }
    assert!(!rules(&["skip proto tcp", "copy"]).uses_mark());
}

#[test]
fn the_first_match_decides_and_this_hosts_own_come_last() {
    let list = rules(&["copy local dport 179", "skip address wan0", "skip address lan0 proto udp"]);
    assert_eq!(list.interfaces(), ["wan0", "lan0"]);
    assert!(list.uses_addresses());
    let published = LocalAddresses::new();
    published.watch(list.interfaces());
    let ours = |text: &str| text.parse::<IpAddr>().expect("an address");
    published.publish([
        (ours("203.0.113.1"), published.bit_of("wan0")),
        (ours("10.0.0.1"), published.bit_of("lan0")),
        (ours("2001:db8:1::1"), published.bit_of("lan0")),
    ]);
    let mut view = LocalView::new();
    assert!(view.follow(&published));
    for (original, verdict, bare) in [
        ("tcp 10.0.0.5:1000 > 203.0.113.1:179", Verdict::Copy, Verdict::Local),
        ("tcp 10.0.0.5:1000 > 203.0.113.1:22", Verdict::Skipped, Verdict::Local),
        ("tcp 10.0.0.5:1000 > 10.0.0.1:22", Verdict::Local, Verdict::Local),
        ("udp 10.0.0.5:1000 > 10.0.0.1:53", Verdict::Skipped, Verdict::Local),
        (NAME, Verdict::Skipped, Verdict::Local),
        (WEB, Verdict::Copy, Verdict::Copy),
    ] {
        assert_eq!(list.verdict(&connection(original), Some(&view)), verdict, "{original}");
        assert_eq!(
            Rules::default().verdict(&connection(original), Some(&view)),
            bare,
            "{original}"
        );
        assert_eq!(
            Rules::default().verdict(&connection(original), None),
            Verdict::Copy,
            "{original}"
        );
    }
    assert_eq!(rules(&["copy", "skip"]).verdict(&connection(NAME), Some(&view)), Verdict::Copy);
}

#[test]
fn every_mistake_is_named_with_what_to_write() {
    for (rule, says) in [
        ("", "copy or skip"),
        ("allow", "'allow' is no verdict: begin with copy or skip"),
        ("skip prot tcp", "'prot' is no condition: write proto"),
        ("skip proto", "'proto' is the last word: write a protocol"),
        ("skip proto tpc", "'tpc' is no protocol: write tcp, udp"),
        ("skip proto 256", "'256' is no protocol"),
        ("skip src", "'src' is the last word"),
        ("skip src 10.0.0", "'10.0.0' is no address: write"),
        ("skip src 10.0.0.0/x", "'10.0.0.0/x' is no address"),
        ("skip src 10.0.0.0/33", "write /0 to /32"),
        ("skip dst ::/129", "write /0 to /128"),
        ("skip dst 10.0.0.1/0", "write 0.0.0.0/0"),
        ("skip dst 2001:db8::1/32", "write 2001:db8::/32"),
        ("skip src ::1 dst 10.0.0.1", "two families"),
        ("skip sport 65536", "'65536' is no port"),
        ("skip dport 1-", "'1-' is no port"),
        ("skip dport 2-1", "'2-1' ends before it begins"),
        ("skip dport 53 proto icmp", "'icmp' has no ports"),
        ("skip sport 53 proto 99", "'99' has no ports"),
        ("skip zone 65536", "'65536' is no zone: write 0 to 65535"),
        ("skip mark 0xg", "'0xg' is no mark"),
        ("skip mark 1/", "'1/' is no mark"),
        ("skip mark 0x10/0x1", "never matches"),
        ("skip address eth0:1", "'eth0:1' is no interface"),
        ("skip address sixteen-letters-", "is no interface"),
        ("skip local local", "'local' is there twice: write two rules"),
    ] {
        let error = Rules::default().add(rule).expect_err(rule);
        assert!(
            error.contains(says) && error.starts_with(&format!("rule '{rule}': ")),
            "{rule}: {error}"
        );
    }
}

#[test]
fn rules_and_interfaces_have_a_limit_and_a_refused_rule_leaves_nothing() {
    let mut full = Rules::default();
    assert!(full.add("skip address lost0 colour blue").is_err());
    assert!(full.interfaces().is_empty());
    (0..RULE_INTERFACES_MAX).for_each(|n| full.add(&format!("skip address if{n}")).expect("room"));
    assert!(full.add("skip address if99").expect_err("one too many").contains("'if99'"));
    (RULE_INTERFACES_MAX..RULES_MAX).for_each(|_| full.add("skip address if31").expect("room"));
    assert!(full.add("skip").expect_err("one too many").contains("256"));
}

#[test]
fn a_file_has_comments_and_an_error_its_line() {
    let mut list = rules(&["copy dport 54"]);
    list.add_lines("# first\n\n  skip dport 53-54 # names\r\n\tskip proto icmp\n").expect("rules");
    let verdict = |original| list.verdict(&connection(original), None);
    assert_eq!([WEB, NAME, PING].map(verdict), [Verdict::Copy, Verdict::Skipped, Verdict::Skipped]);
    assert_eq!(verdict("udp 10.0.0.1:1 > 10.0.0.2:54"), Verdict::Copy);
    assert!(
        list.add_lines("skip\n\nskip it")
            .expect_err("no rule")
            .starts_with("line 3: rule 'skip it': ")
    );
}
