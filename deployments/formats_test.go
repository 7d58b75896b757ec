package deployments

import (
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"pgregory.net/rapid"
)

var hex64 = strings.Repeat("ab", 32)

const releaseURL = "s3://acme-releases/web/1.4.2/manifest.yaml"

func releasePointer(t testing.TB) Pointer {
	t.Helper()
	p, err := ParsePointer(releaseURL + "@sha256:" + hex64)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestCheckSegment(t *testing.T) {
	t.Parallel()
	for s, says := range map[string]string{
		"a": "", "web-1.eu_2": "", strings.Repeat("a", 63): "",
		"": "1 to 63", strings.Repeat("a", 64): "1 to 63", "-a": "1 to 63", "a/b": "1 to 63", "a\n": "1 to 63", "é": "1 to 63",
	} {
		check(t, CheckSegment("unit", s), says)
	}
}

func TestParsePointer(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, text, says string }{
		{"as printed", releaseURL + "@sha256:" + hex64, ""},
		{"with what editors leave", "\ufeff  " + releaseURL + "@sha256:" + strings.ToUpper(hex64) + "\r\n", ""},
		{"on this machine", "http://127.0.0.1:9000/x@sha256:" + hex64, ""},
		{"a file", "file:///srv/releases/m.yaml@sha256:" + hex64, ""},
		{"nothing", " \n", "empty"},
		{"a URL alone", releaseURL, "@sha256:HEX"},
		{"a short digest", releaseURL + "@sha256:abcd", "64 hexadecimal digits, this text has 4 bytes"},
		{"not hexadecimal", releaseURL + "@sha256:" + strings.Repeat("x", 64), "hexadecimal"},
		{"another scheme", "ftp://h/x@sha256:" + hex64, `"ftp" is not one of`},
		{"plain http elsewhere", "http://example.com/x@sha256:" + hex64, "use https://"},
		{"a host that only begins like this machine", "http://127.evil.com/x@sha256:" + hex64, "use https://"},
		{"a password", "https://u:p@h/x@sha256:" + hex64, "user name or password"},
		{"a password in what doesn't parse", "https://u:secret@h:x/y@sha256:" + hex64, "does not parse"},
		{"a password without a digest", "https://u:secret@h/x", "@sha256:HEX"},
		{"a password and half a digest", "https://u:secret@h/x@sha256:abcd", "this text has 4 bytes"},
		{"a signature without a digest", "https://h/x?sig=secret", "@sha256:HEX"},
		{"a signature", "https://h/x?sig=1@sha256:" + hex64, ""},
		{"a version of S3's", "s3://b/x?versionId=1@sha256:" + hex64, ""},
		{"a query of S3's", "s3://b/x?x=1@sha256:" + hex64, "carries a query"},
		{"a file with a ?", "file:///srv/what?@sha256:" + hex64, "written as %3F"},
		{"a file with a #", "file:///srv/#@sha256:" + hex64, "written as %23"},
		{"a line break in a fragment", "s3://b/x#a%0ab@sha256:" + hex64, "a fragment (#a%0ab): a #"},
		{"a file with a %", "file:///srv/100%/x@sha256:" + hex64, "written as %25"},
		{"half a file URL", "file:/srv/x@sha256:" + hex64, "file:///ABSOLUTE/PATH"},
		{"two words", "s3://b/a b@sha256:" + hex64, "white space"},
		{"a bucket alone", "s3://bucket@sha256:" + hex64, "path"},
		{"too long", "s3://b/" + strings.Repeat("x", MaxPointer) + "@sha256:" + hex64, "at most"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, err := ParsePointer(c.text)
			check(t, err, c.says)
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("%v tells a secret", err)
			}
			if err == nil {
				if again, err := ParsePointer(p.String()); err != nil || again != p {
					t.Errorf("%v read again is %v, %v", p, again, err)
				}
			}
		})
	}
}

// check fails unless err says what is wanted; "": no error.
func check(t *testing.T, err error, says ...string) {
	t.Helper()
	for _, want := range says {
		switch {
		case want == "" && err != nil:
			t.Errorf("unexpected error: %v", err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("error %v, want one that says %q", err, want)
		}
	}
}

func TestParsePin(t *testing.T) {
	t.Parallel()
	p := releasePointer(t)
	until := time.Date(2026, 11, 24, 8, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name, text string
		want       Pin
		says       string
	}{
		{"a pointer", p.String() + "\n", Pin{Release: p}, ""},
		{"a pointer with CRLF and a BOM", "\ufeff" + p.String() + "\r\n", Pin{Release: p}, ""},
		{"hold", "hold\n", Pin{Hold: true}, ""},
		{"YAML", "release: " + p.String() + "\nreason: incident 812\nby: alice\nuntil: 2026-11-24T08:00:00Z\n", Pin{Release: p, Reason: "incident 812", By: "alice", Until: until}, ""},
		{"YAML with CRLF and a comment first", "# at night\r\nrelease: hold\r\nby: bob\r\n", Pin{Hold: true, By: "bob"}, ""},
		{"JSON", `{"release":"` + p.String() + `","until":"2026-11-24 09:00 Europe/Berlin"}`, Pin{Release: p, Until: until}, ""},
		{"at once", "release: hold\nat_once: true\n", Pin{Hold: true, AtOnce: true}, ""},
		{"empty", "", Pin{}, "empty"},
		{"blank", " \r\n", Pin{}, "empty"},
		{"a typo", "hodl", Pin{}, "neither a pointer nor hold"},
		{"a URL alone", releaseURL, Pin{}, "@sha256:HEX"},
		{"an unknown field", "relaese: " + p.String(), Pin{}, `did you mean "release"?`},
		{"a field twice", "release: hold\nrelease: hold\n", Pin{}, `pin:2:1: field "release" is given twice`},
		{"both", "release: " + p.String() + "\nhold: true\n", Pin{}, "both"},
		{"neither", "reason: because\n", Pin{}, "no release"},
		{"a time without zone", "release: hold\nuntil: 2026-11-24 09:00\n", Pin{}, "with its zone"},
		{"an alias bomb", "release: &a hold\nby: *a\n", Pin{}, "anchors"},
		{"two documents", "release: hold\n---\nrelease: hold\n", Pin{}, "second document"},
		{"too large", strings.Repeat("x", MaxPin+1), Pin{}, "at most"},
		{"binary", "release: \x00\x01", Pin{}, "control character"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParsePin([]byte(c.text))
			check(t, err, c.says)
			if !got.Until.Equal(c.want.Until) {
				t.Errorf("until %v, want %v", got.Until, c.want.Until)
			}
			got.Until, c.want.Until = time.Time{}, time.Time{}
			if got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestParseOrder(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, text string
		want       Order
		says       string
	}{
		{"a bare verb", "promote\n", Order{Verb: VerbPromote}, ""},
		{"as Windows and a tired person write it", "\ufeff Retry\r\n", Order{Verb: VerbRetry}, ""},
		{"YAML", "order: abort\nby: alice\nreason: incident 812\n", Order{VerbAbort, "alice", "incident 812"}, ""},
		{"JSON", `{"order":"pause","by":"bob"}`, Order{Verb: VerbPause, By: "bob"}, ""},
		{"empty", " \n", Order{}, "empty"},
		{"a typo", "promte", Order{}, `"promte": want promote, pause, resume, abort or retry`},
		{"a typo in YAML", "order: promte\nby: bob\n", Order{}, "order:1:8"},
		{"an unknown field", "order: pause\nwho: bob\n", Order{}, `unknown field "who"`},
		{"no verb", "by: bob\n", Order{}, "the order lacks"},
		{"too large", strings.Repeat("x", MaxOrder+1), Order{}, "at most"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseOrder([]byte(c.text))
			check(t, err, c.says)
			if err == nil && got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestParseRecord(t *testing.T) {
	t.Parallel()
	p := releasePointer(t)
	for _, c := range []struct{ name, text, says string }{
		{"a bare pointer", p.String() + "\r\n", ""},
		{"JSON", `{"target":"` + p.String() + `","generation":3}`, ""},
		{"empty", "", "empty"},
		{"half", `{"target":"` + p.String(), "unexpected end"},
		{"a newer mirror's field", `{"target":"` + p.String() + `","generation":3,"x":{"y":1}}`, ""},
		{"one for newer agents", `{"target":{"url":1},"min_agent":99}`, "needs format level 99"},
		{"no target", `{"generation":3}`, `no "target"`},
		{"an unknown phase", `{"target":"` + p.String() + `","generation":1,"rollout":{"phase":"x","cutoff":"0","since":"2026-11-24T08:00:00Z"}}`, "unknown phase"},
		{"more behind it", `{"target":"` + p.String() + `","generation":3}{}`, "after top-level value"},
		{"a hostile after", `{"target":"` + p.String() + `","generation":3,"after":["../x"]}`, "after"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseRecord([]byte(c.text))
			check(t, err, c.says)
		})
	}
}

// TestEarlierNames reads a record as the version before wrote it.
func TestEarlierNames(t *testing.T) {
	t.Parallel()
	p := releasePointer(t)
	const text = `{"target":"%[1]s","generation":3,"rollout":{"phase":"%[2]s","cutoff":"7","since":"2026-11-24T08:00:00Z",
		"reason":"%[4]s","bad":"%[3]s","healthy":"2026-11-24T09:00:00Z","borne":2,"over":[{"digest":"%[3]s","cutoff":"5"}]}}`
	for _, c := range []struct {
		phase, words string
		want         Phase
		reason       Reason
	}{
		{"waiting", "the canaries are healthy: waits for promote", PhasePendingApproval, ""},
		{"rolling", "frozen by xmas until 2026-12-27 08:00Z", PhaseRolling, ReasonFrozen},
		{"back", "its file is no longer in Git, so it stands where it is", PhaseRollingBack, ReasonOrphaned},
		{"halted", "rolled back: aborted by an operator", PhaseRolledBack, ""},
	} {
		r, err := ParseRecord(fmt.Appendf(nil, text, p, c.phase, p.Digest, c.words))
		if err != nil {
			t.Fatal(err)
		}
		got := *r.Rollout
		if got.Phase != c.want || got.Reason != c.reason || got.Message != c.words || got.Failed != p.Digest ||
			got.HealthySince.Hour() != 9 || got.Tolerated != 2 || len(got.Superseded) != 1 || got.Cutoff != 7 {
			t.Errorf("phase %s: %+v", c.phase, got)
		}
	}
}

// A record is the same after it was written and read, and stays small.
func TestRecordRoundTrip(t *testing.T) {
	t.Parallel()
	p := releasePointer(t)
	rapid.Check(t, func(t *rapid.T) {
		r := Record{Target: p, Generation: rapid.Int64Range(0, 1<<40).Draw(t, "generation"), Retry: rapid.Int64Range(0, 9).Draw(t, "retry"),
			Commit: strings.Repeat("c", 40), Drift: rapid.SampledFrom([]Drift{"", DriftHeal, DriftReport}).Draw(t, "drift")}
		if rapid.Bool().Draw(t, "stable") {
			r.Stable = p
		}
		if rapid.Bool().Draw(t, "rollout") {
			r.Rollout = &Progress{Phase: PhaseCanary, Cutoff: rapid.Uint64().Draw(t, "cutoff"), Since: time.Unix(rapid.Int64Range(0, 1<<33).Draw(t, "since"), 0).UTC()}
		}
		data, err := json.Marshal(r)
		if err != nil || len(data) > 1024 {
			t.Fatalf("%d bytes, %v", len(data), err)
		}
		again, err := ParseRecord(data)
		if err != nil || !reflect.DeepEqual(again, r) {
			t.Fatalf("%+v read again is %+v, %v", r, again, err)
		}
	})
}

func TestLoadNamesEveryMistake(t *testing.T) {
	t.Parallel()
	good := "release: " + releaseURL + "@sha256:" + hex64 + "\n"
	for _, c := range []struct {
		name  string
		files map[string]string
		says  []string
	}{
		{"a good commit", map[string]string{"prod/web/app.yaml": good + "after: [base]\n", "prod/web/base.yml": good, "README.md": "x", ".github/ci.yaml": "x: y"}, []string{""}},
		{"an unknown field", map[string]string{"prod/web/app.yaml": good + "relaese: x\n"}, []string{`prod/web/app.yaml:2:1: unknown field "relaese" in a unit: did you mean "release"?`}},
		{"a URL alone", map[string]string{"prod/web/app.yaml": "release: " + releaseURL + "\n"}, []string{"prod/web/app.yaml:1:10:", "@sha256:HEX"}},
		{"a field twice", map[string]string{"prod/web/app.yaml": good + good}, []string{"prod/web/app.yaml:2:1:"}},
		{"a unit twice", map[string]string{"prod/web/app.yaml": good, "prod/web/app.yml": good}, []string{"prod/web/app.yml: unit prod/web/app stands in prod/web/app.yaml as well"}},
		{"a cycle", map[string]string{"prod/web/a.yaml": good + "after: [b]\n", "prod/web/b.yaml": good + "after: [c]\n", "prod/web/c.yaml": good + "after: [a]\n"}, []string{"prod/web/c.yaml:2:9:", "cycle: a after b after c after a"}},
		{"after itself", map[string]string{"prod/web/a.yaml": good + "after: a\n"}, []string{"prod/web/a.yaml:2:8:", "cycle"}},
		{"after more than a record holds", map[string]string{"prod/web/a.yaml": good + "after: [" + strings.Repeat("b,", 101) + "]\n", "prod/web/b.yaml": good}, []string{"prod/web/a.yaml:2:8:", "after has 101 names, at most 100"}},
		{"after nothing", map[string]string{"prod/web/a.yaml": good + "after: [basse]\n"}, []string{"prod/web/a.yaml:2:9:", `no unit of prod/web`}},
		{"an empty file", map[string]string{"prod/web/a.yaml": ""}, []string{"prod/web/a.yaml: the file is empty"}},
		{"a comment alone", map[string]string{"prod/web/a.yaml": "# nothing\n"}, []string{"prod/web/a.yaml: the file is empty"}},
		{"no release", map[string]string{"prod/web/a.yaml": "after: []\n"}, []string{"prod/web/a.yaml:1:1: release is missing"}},
		{"a file in a wrong place", map[string]string{"prod/app.yaml": good}, []string{"prod/app.yaml: a unit's file lies at"}},
		{"a bad name", map[string]string{"prod/web/-x.yaml": good}, []string{"prod/web/-x.yaml: unit"}},
		{"tabs", map[string]string{"prod/web/a.yaml": "release:\n\tx: y\n"}, []string{"prod/web/a.yaml:"}},
		{"a bad rollout", map[string]string{"prod/web/a.yaml": good + "rollout:\n  canary: lots\n  max_unavailable: 0\n  on_failure: panic\n  bake: 5\n"},
			[]string{"a.yaml:3:11:", "a.yaml:4:20:", "a.yaml:5:15:", "a.yaml:6:9:"}},
		{"settings that don't parse", map[string]string{"kedge.yaml": "prune: perhaps\n", "prod/web/a.yaml": good}, []string{"kedge.yaml:1:8:"}},
		{"a source that isn't allowed", map[string]string{"kedge.yaml": "sources:\n  \"*\": [s3://other/]\n", "prod/web/a.yaml": good}, []string{"prod/web/a.yaml:1:10:", "not among the sources"}},
		{"bounds by stage", map[string]string{"kedge.yaml": "dests: {prod: [/srv], \"*\": /opt}\nusers:\n  prod: [app, www]\ncommands:\n  prod: false\n", "prod/web/a.yaml": good}, []string{""}},
		{"bad bounds", map[string]string{"kedge.yaml": "sources:\n  prod: []\ndests:\n  prod: [srv]\n  prod: [/srv]\n  dev: [/]\nusers: app\ncommands:\n  prod: maybe\n  -x: true\n  dev:\n", "prod/web/a.yaml": good},
			[]string{"kedge.yaml:2:9: the list is empty", `kedge.yaml:4:10: dest "srv"`, `kedge.yaml:6:9: dest "/"`, "kedge.yaml:7:8: users: want a value by stage, as in prod: [app]",
				`kedge.yaml:9:9: "maybe": want true or false`, `kedge.yaml:10:3: stage "-x"`, `kedge.yaml:11:3: stage "dev" has no value in commands`}},
		{"a stage twice", map[string]string{"kedge.yaml": "users:\n  prod: [app]\n  prod: [root]\n",
			"prod/web/a.yaml": good}, []string{`kedge.yaml:3:3: stage "prod" is given twice in users`}},
		{"a freeze that never opens", map[string]string{"kedge.yaml": "freeze:\n- allow: 0 9 30 2 *\n  duration: 1h\n", "prod/web/a.yaml": good}, []string{"kedge.yaml:2:10: ", "no such day"}},
		{"a bad freeze", map[string]string{"kedge.yaml": "freeze:\n- deny: \"* * *\"\n  zone: Mars/Base\n", "prod/web/a.yaml": good}, []string{"kedge.yaml:2:9:", "kedge.yaml:3:9:", "duration"}},
		{"two mistakes in two files", map[string]string{"prod/web/a.yaml": "x: y\n", "prod/web/b.yaml": "z: y\n"}, []string{"a.yaml:1:1:", "b.yaml:1:1:"}},
		{"an alias", map[string]string{"prod/web/a.yaml": good + "after: &a [b]\n"}, []string{"prod/web/a.yaml:2:", "anchors"}},
		{"a null", map[string]string{"prod/web/a.yaml": "release:\n"}, []string{"prod/web/a.yaml:1:1:", "no value"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			fsys := fstest.MapFS{}
			for name, content := range c.files {
				fsys[name] = &fstest.MapFile{Data: []byte(content)}
			}
			tree, err := Load(fsys)
			check(t, err, c.says...)
			if (tree == nil) == (err == nil) {
				t.Errorf("tree %v with error %v", tree, err)
			}
		})
	}
}

// What hides units from the reader is a mistake, or a warning where it may be there for something
// else.
func TestLoadNamesWhatHidesUnits(t *testing.T) {
	t.Parallel()
	good := "release: " + releaseURL + "@sha256:" + hex64 + "\n"
	for _, c := range []struct {
		name, file string
		warns      string // empty: says is the mistake, if any
		says       string
	}{
		{"a submodule for a stage", "prod/.git", "warning: prod is a submodule", ""},
		{"a submodule for a role", "prod/api/.git", "", "prod/api: it is a submodule"},
		{"a submodule for a unit's file", "prod/api/app.yaml/.git", "", "prod/api/app.yaml: it is a directory"},
		{"a directory for a unit's file", "prod/api/app.yml/README.md", "", "prod/api/app.yml: it is a directory"},
		{"a submodule where no unit lies", "docs/manual/theme/.git", "", ""},
		{"a submodule that can be no stage", "-x/.git", "", ""},
	} {
		files := fstest.MapFS{"dev/web/app.yaml": {Data: []byte(good)}, c.file: {}}
		tree, err := Load(files)
		check(t, err, c.says)
		if err != nil {
			continue
		}
		warnings := ""
		for _, w := range tree.Warnings() {
			warnings += "warning: " + w + "\n"
		}
		if (warnings == "") != (c.warns == "") || !strings.Contains(warnings, c.warns) {
			t.Errorf("%s: %q, want %q", c.name, warnings, c.warns)
		}
	}
}

// Whatever bytes a unit's file holds, its mistake is named, and nothing of the commit is taken.
func TestLoadHostileFiles(t *testing.T) {
	t.Parallel()
	good := "release: " + releaseURL + "@sha256:" + hex64 + "\n"
	for _, c := range []struct{ name, text, says string }{
		{"a byte-order mark and CRLF", "\ufeff" + strings.ReplaceAll(good+"after: [base]\n", "\n", "\r\n"), ""},
		{"a comment and a document's beginning", "# the app\n---\n" + good, ""},
		{"a NUL", good + "drift: \x00\n", "prod/web/app.yaml:2:1: the line contains a control character"},
		{"UTF-16", "r\x00e\x00l\x00\xff\xfe", "prod/web/app.yaml: the file is not UTF-8 text"},
		{"too large", good + strings.Repeat("#\n", MaxUnitFile), "bytes, at most 65536 are allowed"},
		{"nested too deep", "release: " + strings.Repeat("[", 1000), "prod/web/app.yaml: the file is nested deeper than 40 levels"},
		{"more keys than anybody reads", strings.Repeat("x:\n", maxKeys+1), "prod/web/app.yaml: the file has 10001 keys and items, at most 10000 are allowed"},
		{"as many without a colon", strings.Repeat("? a\n", maxKeys+1), "prod/web/app.yaml: the file has 10001 keys and items"},
		{"as many behind tabs", "release: {" + strings.Repeat("\t? a\n", maxKeys+1), "prod/web/app.yaml: the file has 10001 keys and items"},
		{"as many in braces", "release: {" + strings.Repeat("a,\n", maxKeys), "prod/web/app.yaml: the file has 10001 keys and items"},
		{"more items than anybody reads", strings.Repeat("-\n", maxKeys+1), "prod/web/app.yaml: the file has 10001 keys and items"},
		{"more mistakes than anybody reads", good + strings.Repeat("after: [base]\n", 1000), "prod/web/app.yaml: more than 100 mistakes; some of them:"},
		{"a second document", good + "---\n" + good, "prod/web/app.yaml:3:1: the file holds a second document"},
		{"more documents than anybody reads", strings.Repeat("--- a\n", MaxUnitFile/8), "prod/web/app.yaml: the file holds 8192 documents: want one"},
		{"laughs", "a: &a [x, x]\nb: &b [*a, *a]\n" + good, "prod/web/app.yaml:1:"},
		{"a merge key", good + "<<: {drift: heal}\n", "anchors, aliases and merge keys are not read here"},
		{"a tag", "release: !!binary x\n", "prod/web/app.yaml:1:10: tags are not read here"},
		{"a list", "- " + good, "prod/web/app.yaml:1:1: a unit: want fields"},
		{"a text", "hello\n", "prod/web/app.yaml:1:1: a unit: want fields"},
		{"a list for a release", "release: [a, b]\n", "want a single value here"},
		{"an open quote", "release: \"s3://\n", "prod/web/app.yaml:1:"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tree, err := Load(fstest.MapFS{"prod/web/app.yaml": {Data: []byte(c.text)}, "prod/web/base.yaml": {Data: []byte(good)}})
			check(t, err, c.says)
			if (tree == nil) == (err == nil) {
				t.Errorf("tree %v with error %v", tree, err)
			}
			if err != nil && len(err.Error()) > 64<<10 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

func TestLoadReadsAllOfIt(t *testing.T) {
	t.Parallel()
	good := "release: " + releaseURL + "@sha256:" + hex64 + "\n"
	tree, err := Load(fstest.MapFS{
		"kedge.yaml":        {Data: []byte("max_removed: 50\nprune: true\nrollout:\n  max_unavailable: 10%\nfreeze:\n- name: weekend\n  deny: 0 16 * * FRI\n  duration: 60h\n  zone: Europe/Berlin\n  units: [prod/*/*]\n")},
		"prod/web/app.yaml": {Data: []byte(good + "rollout:\n  canary: 1\n  bake: 5m\n  max_failures: 2\n  approval: manual\n  fast_back: false\ndrift: heal\nadopt: true\n")},
		"prod/db/pg.yaml":   {Data: []byte(good)},
	})
	if err != nil {
		t.Fatal(err)
	}
	if s := tree.Settings; s.MaxRemoved != 50 || !s.Prune || len(s.Freeze) != 1 || s.Freeze[0].Zone.String() != "Europe/Berlin" || s.Freeze[0].Duration != 60*time.Hour {
		t.Errorf("settings %+v", s)
	}
	if len(tree.Units) != 2 || tree.Units[0].ID.Role != "db" {
		t.Fatalf("units %+v", tree.Units)
	}
	app := tree.Units[1]
	want := Rollout{Canary: Amount{N: 1}, Bake: 5 * time.Minute, MaxUnavailable: Amount{10, true}, MaxFailures: Amount{N: 2}, OnFailure: Rollback, Approval: Manual, Deadline: 10 * time.Minute}
	if want := (Place{"prod/web/app.yaml", 1, 10}); app.Place != want {
		t.Errorf("app's release stands at %+v, want %+v", app.Place, want)
	}
	if *app.Rollout != want || app.Drift != DriftHeal {
		t.Errorf("app %+v, rollout %+v", app, *app.Rollout)
	}
	if pg := tree.Units[0]; pg.Rollout.Canary.N != 0 || pg.Rollout.MaxUnavailable != (Amount{10, true}) {
		t.Errorf("pg's rollout %+v: it holds what another unit's file says", pg.Rollout)
	}
}

func TestUnderPrefix(t *testing.T) {
	t.Parallel()
	for url, want := range map[string]bool{
		"s3://acme/web/1/manifest.yaml":         true,
		"s3://acme/webx/1":                      false,
		"s3://acme/web/../db/1":                 false,
		"s3://acme/web/%2e%2e/db/1":             false,
		"s3://acme/web//1":                      false,
		"s3://acme/web/./1":                     false,
		"s3://acme/web/1?versionId=2":           true,
		"s3://acme/web/1?versionId=2/../x":      false,
		"s3://acme/web/../db?versionId=2":       false,
		"s3://acme/web/1?x=2":                   false,
		"https://acme/web/1?versionId=2":        false,
		"s3://acme/web":                         false,
		"https://acme/web/1":                    false,
		"s3://acme/web/1/deep/er/manifest.yaml": true,
	} {
		if got := UnderPrefix(url, "s3://acme/web"); got != want {
			t.Errorf("%s under s3://acme/web: %v", url, got)
		}
		if got := UnderPrefix(url, "s3://acme/web/"); got != want {
			t.Errorf("%s under s3://acme/web/: %v", url, got)
		}
	}
}

// A source is a URL, or what lies below it by whole segments: the same for a commit and for an agent.
func TestFromSource(t *testing.T) {
	t.Parallel()
	exact := "s3://acme/web/1/manifest.yaml"
	for _, c := range []struct {
		source string
		want   bool
	}{
		{exact, true}, {"s3://acme/web", true}, {"s3://acme/web/", true}, {"s3://acme", true},
		{"s3://acme/we", false}, {"s3://acm", false}, {exact + "/", false},
	} {
		if got := FromSource(exact, []string{"gs://other", c.source}); got != c.want {
			t.Errorf("%s from %s: %t", exact, c.source, got)
		}
		tree := fstest.MapFS{
			"kedge.yaml":        {Data: []byte("sources: {prod: [" + c.source + "]}\n")},
			"prod/web/app.yaml": {Data: []byte("release: " + exact + "@sha256:" + hex64 + "\n")},
		}
		if _, err := Load(tree); (err == nil) != c.want {
			t.Errorf("a commit with source %s: %v", c.source, err)
		}
	}
}

// Of a percentage of nodes there is always one, and never one that isn't begun.
func TestAmountOf(t *testing.T) {
	t.Parallel()
	tenth := Amount{N: 10, Percent: true}
	for n := range 101 {
		if got, want := tenth.Of(n), int(math.Ceil(float64(n)/10)); got != want {
			t.Errorf("10%% of %d is %d, want %d", n, got, want)
		}
		if got := (Amount{N: 100, Percent: true}).Of(n); got != n {
			t.Errorf("all of %d are %d", n, got)
		}
		if got := (Amount{N: 3}).Of(n); got != 3 {
			t.Errorf("3 of %d are %d", n, got)
		}
	}
}

// An agent of the previous version says why under another JSON name.
func TestReportOfThePreviousVersion(t *testing.T) {
	t.Parallel()
	for value, want := range map[string]string{
		`{"units":{"app":{"state":"waiting","why":"waits for base"},"base":{"state":"converged"}}}`:        "waits for base",
		`{"units":{"app":{"state":"waiting","message":"a pin","why":"old"},"base":{"state":"converged"}}}`: "a pin",
		`{"units":{"app":{"state":"waiting","message":"a pin"},"base":{"state":"converged","why":[]}}}`:    "a pin",
	} {
		r, err := ParseReport([]byte(value))
		if err != nil || len(r.Units) != 2 || r.Units["app"].Message != want || r.Units["app"].State != StateWaiting {
			t.Errorf("%s: %+v, %v", value, r, err)
		}
	}
}

// A node that makes up units has a report with as many as a role may have, or none.
func TestReportsOfTooManyUnits(t *testing.T) {
	t.Parallel()
	units := map[string]UnitReport{}
	for i := range MaxRoleUnits + 1 {
		value, err := json.Marshal(Report{Units: units})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseReport(value); err != nil {
			t.Errorf("%d units: %v", i, err)
		}
		units[fmt.Sprintf("u%d", i)] = UnitReport{State: StateConverged}
	}
	value, err := json.Marshal(Report{Units: units})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := ParseReport(value); err == nil || len(r.Units) > 0 {
		t.Errorf("%d units are read: %v", len(r.Units), err)
	}
}
