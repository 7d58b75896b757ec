package deployments

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

const manifestURL = "s3://acme-releases/web/1.4.2/manifest.yaml"

// What stretcher's documentation shows, deploys unchanged.
const stretchers = `
src: s3://example.com/app.tar.gz
checksum: e0840daaa97cd2cf2175f9e5d133ffb3324a2b93
dest: /home/stretcher/app/
dest_mode: 0711
commands:
  pre:
    - echo 'staring deploy'
  post:
    - echo 'deploy done'
  success:
    - echo 'deploy success'
    - cat >> /path/to/deploy.log
  failure:
    - echo 'deploy failed!!'
excludes:
  - "*.pid"
  - "*.socket"
sync_strategy: rsync
`

func TestStretchersManifest(t *testing.T) {
	t.Parallel()
	m, err := ParseManifest([]byte(stretchers), manifestURL, nil)
	if err != nil {
		t.Fatal(err)
	}
	run := func(s string) Command { return Command{Run: s, Timeout: 24 * time.Hour} }
	want := &Manifest{
		Src: "s3://example.com/app.tar.gz", Checksum: "e0840daaa97cd2cf2175f9e5d133ffb3324a2b93", Dest: "/home/stretcher/app", DestMode: 0o711,
		Strategy: StrategyRsync, Excludes: []string{"*.pid", "*.socket"}, Keep: 3,
		Commands: Commands{
			Pre: []Command{run("echo 'staring deploy'")}, Post: []Command{run("echo 'deploy done'")},
			Success: []Command{run("echo 'deploy success'"), run("cat >> /path/to/deploy.log")}, Failure: []Command{run("echo 'deploy failed!!'")},
		},
		Symlinks: SymlinksInside,
		Health:   Health{Timeout: time.Minute, Every: 10 * time.Second, Failures: 3},
	}
	if !reflect.DeepEqual(m, want) {
		t.Errorf("got  %+v\nwant %+v", m, want)
	}
}

// secretAliases has one more alias for secrets than resolve follows.
var secretAliases = func() string {
	var b strings.Builder
	b.WriteString("x-a: &a ssm:/x\nsecrets:\n")
	for i := range maxAliases + 1 {
		fmt.Fprintf(&b, "  A%d: *a\n", i)
	}
	return b.String()
}()

func TestManifestMistakes(t *testing.T) {
	t.Parallel()
	base := "src: app.tar.zst\nchecksum: " + hex64 + "\ndest: /srv/app\n"
	for _, c := range []struct{ name, text, says string }{
		{"good", base, ""},
		{"fields without a value, as stretcher takes them", base + "dest_mode:\nsync_strategy:\nexcludes:\ncommands:\n  pre:\n  post: [uptime]\n", ""},
		{"a checksum without a value", "src: app.tar\ndest: /srv/app\nchecksum:\n", "checksum is missing"},
		{"commands only", "commands:\n  pre: [uptime]\n", ""},
		{"what stays, and checks that go on", base + "sync_strategy: release\nshared: [log, public/uploads]\nsymlinks: any\nhealth: {every: 30s, failures: 5, checks: [{tcp: 'db:1', during: deploy}]}\ncommands: {post: [{run: reboot, once: true}]}\n", ""},
		{"variables for commands", base + "commands: {env: {RAILS_ENV: production, EMPTY: }}\n", ""},
		{"a variable of kedge's own", base + "commands: {env: {KEDGE_DEST: /}}\n", "are reserved"},
		{"a variable's name", base + "commands: {env: {a-b: /}}\n", `variable "a-b": want letters`},
		{"variables in a list", base + "commands: {env: [A=1]}\n", "want variables by name"},
		{"shared outside", base + "sync_strategy: release\nshared: [../x]\n", "want a path within the tree"},
		{"shared twice", base + "sync_strategy: release\nshared: [log/a, log]\n", "within another"},
		{"shared with rsync", base + "shared: [log]\n", "shared needs sync_strategy release"},
		{"symlinks", base + "symlinks: none\n", `"none"`},
		{"during", base + "health: {checks: [{tcp: 'db:1', during: always}]}\n", `"always"`},
		{"empty", "\n", "empty"},
		{"an unknown field", base + "desc: x\n", `manifest:4:1: unknown field "desc" in the manifest: did you mean "dest"?`},
		{"no dest", "src: app.tar\nchecksum: " + hex64 + "\n", "dest is missing"},
		{"no checksum", "src: app.tar\ndest: /srv/app\n", "checksum is missing"},
		{"a checksum of no kind", strings.Replace(base, hex64, "abcd", 1), "4 digits"},
		{"a relative dest", strings.Replace(base, "/srv/app", "srv/app", 1), "absolute"},
		{"the root", strings.Replace(base, "/srv/app", "/srv/..", 1), "absolute"},
		{"src that leaves its bucket", strings.Replace(base, "app.tar.zst", "../../../../../etc/x", 1), ""},
		{"a decimal mode", base + "dest_mode: 493\n", "octal"},
		{"more than a mode", base + "dest_mode: 010755\n", "octal"},
		{"no text for a checksum", "src: app.tar\ndest: /srv/app\nchecksum: ''\n", "checksum is missing"},
		{"no text for dest", "src: app.tar\nchecksum: " + hex64 + "\ndest: \"\"\n", "dest is missing"},
		{"no text for keep", base + "keep: ''\n", "whole number"},
		{"an alias of nothing", base + "owner: *x\n", "there is no anchor &x"},
		{"an anchor twice", base + "x-a: &a 1\nx-b: &a 2\n", "is given twice"},
		{"an alias within itself", base + "commands: &a {<<: *a}\n", "followed more than"},
		{"an alias of a list in a list", base + "excludes: &a [*a]\n", "want a single value"},
		{"merged from text", base + "commands: {<<: text}\n", "want an alias"},
		{"aliases of aliases", base + "x-a: &a {x-1: 1}\n" +
			"commands: {<<: [" + strings.Repeat("*a,", 201) + "]}\n", "more than 200 times"},
		{"more aliases of secrets than are followed", base + secretAliases, "more than 200 times"},
		{"a secret without a reference", base + "secrets: {DB_URL: }\n", `manifest:4:10: secret "DB_URL" has no reference`},
		{"a tag", base + "owner: !!str root\n", "tags"},
		{"a check of two kinds", base + "health:\n  checks:\n  - tcp: localhost:80\n    exec: true\n", "manifest:6:5: a check is exactly one of"},
		{"a user of what runs nothing", base + "health:\n  checks:\n  - tcp: localhost:80\n    user: app\n",
			"manifest:7:5: user is for exec alone"},
		{"a check of no kind", base + "health:\n  checks:\n  - interval: 1s\n", "this has 0"},
		{"a check of an empty address", base + "health:\n  checks:\n  - tcp: ''\n", "manifest:6:10: the text is empty"},
		{"a check of an empty command", base + "health:\n  checks:\n  - exec: ' '\n", "the text is empty"},
		{"a check of an empty unit", base + "health:\n  checks:\n  - systemd: ''\n", "the text is empty"},
		{"a check of an empty service", base + "health:\n  checks:\n  - consul: '{{ env \"NOBODY\" \"\" }}'\n",
			"manifest:6:13: the text is empty"},
		{"an index without size", base + "index:\n  url: index\n  sha256: " + hex64 + "\n", "index lacks the field size"},
		{"a strategy", base + "sync_strategy: copy\n", "want rsync or mv or release"},
		{"excludes of a release", base + "sync_strategy: release\nexcludes: [x]\n", "sync_strategy rsync only"},
		{"a variable that isn't set", base + "owner: '{{ must_env \"NOBODY\" }}'\n", "NOBODY is not set on this node"},
		{"two variables that must be set", base + "owner: '{{ must_env \"A\" \"B\" }}'\n", "want {{ must_env"},
		{"a template that loops", base + "{{ range 100 }}x{{ end }}", "template may use only {{ if }}"},
		{"a template that calls", base + "{{ call 1 }}", "not defined"},
		{"a template that defines", base + "{{ define `x` }}{{ end }}", "can't be defined"},
		{"a format that grows", base + "{{ printf \"%9999d\" 1 }}", "width and precision are at most"},
		{"a format that grows by a number", base + "{{ printf \"%*d\" 999999 1 }}", "verbs"},
		{"a thousand ifs", base + strings.Repeat("{{if 1}}{{end}}", 1001), "at most 2000"},
		{"data", base + "{{ .Values.x }}", "environment variables only"},
		{"the longest names", base + "version: " + strings.Repeat("v", 128) + "\nowner: " + strings.Repeat("u", 64) + ":" + strings.Repeat("g", 64) + "\n", ""},
		{"a version too long", base + "version: " + strings.Repeat("v", 129) + "\n", "want 1 to 128 letters"},
		{"a user too long", base + "owner: " + strings.Repeat("u", 65) + "\n", "want USER, USER:GROUP"},
		{"too large", strings.Repeat("#", MaxManifest+1), "at most"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, err := ParseManifest([]byte(c.text), manifestURL, func(string) (string, bool) { return "", false })
			check(t, err, c.says)
			if (m == nil) == (err == nil) {
				t.Errorf("manifest %v with error %v", m, err)
			}
		})
	}
}

func TestManifestVariables(t *testing.T) {
	t.Parallel()
	env := func(name string) (string, bool) {
		v, ok := map[string]string{"A": "one", "EMPTY": "", "QUOTED": `"<`}[name]
		return v, ok
	}
	for text, want := range map[string]string{
		`{{ if env "A" "" }}yes{{ else }}no{{ end }}`:                    "yes",
		`{{ if eq (env "A" "") "two" "one" }}yes{{ else }}no{{ end }}`:   "yes",
		`{{ if and (env "B" "") (must_env "B") }}yes{{ else }}no{{end}}`: "no",
		`{{ with env "B" "" }}{{ . }}{{ else }}none{{ end }}`:            "none",
		`{{ $a := env "A" "" }}{{ with $a }}{{ . }}-{{ $a }}{{ end }}`:   "one-one",
		`{{ printf "%s-%03d" (env "A" "x") 7 }}`:                         "one-007",
		`{{ "A" | env | printf "%q" }}`:                                  `"one"`,
		`{{ must_env "QUOTED" | json_escape }}`:                          `\"\u003c`,
		`{{ if not true }}x{{ else if lt 1 2 }}less{{ end }}`:            "less",
		`{{ env "A" "x" }}`:                  "one",
		`{{ env "EMPTY" "x" }}`:              "x",
		`{{ env "B" "A" "x" }}`:              "one",
		"{{must_env `A`}}":                   "one",
		`{{- must_env "A" | json_escape -}}`: "one",
		`a {{/* nothing */}} b`:              "a  b",
	} {
		parsed, err := parseTemplate(text)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parsed.expand(env, nil); err != nil || got.text != want {
			t.Errorf("%s gives %q, %v; want %q", text, got.text, err, want)
		}
	}
}

func TestRelativeURLs(t *testing.T) {
	t.Parallel()
	for src, want := range map[string]string{
		"archive.tar.zst":         "s3://acme-releases/web/1.4.2/archive.tar.zst",
		"../shared/x.tar":         "s3://acme-releases/web/shared/x.tar",
		"../../../../x.tar":       "s3://acme-releases/x.tar",
		"gs://bucket/x.tar":       "gs://bucket/x.tar",
		"https://h.example/x.tar": "https://h.example/x.tar",
	} {
		m, err := ParseManifest([]byte("dest: /d\nchecksum: "+hex64+"\nsrc: "+src+"\n"), manifestURL, nil)
		if err != nil || m.Src != want {
			t.Errorf("src %s is %+v, %v; want %s", src, m, err, want)
		}
	}
	for url, want := range map[string]string{
		"s3://b/m.yaml":                 "s3://b/x.tar",
		"s3://b//a//m.yaml":             "s3://b//a//x.tar",
		"s3://b/100%25/ü/m.yaml":        "s3://b/100%25/ü/x.tar",
		"https://h.example/a/m?t=1/2/3": "https://h.example/a/x.tar",
		"https://h.example/m?t=1/2/3":   "https://h.example/x.tar",
	} {
		m, err := ParseManifest([]byte("dest: /d\nchecksum: "+hex64+"\nsrc: ./x.tar\n"), url, nil)
		if err != nil || m.Src != want {
			t.Errorf("beside %s: %+v, %v; want %s", url, m, err, want)
		}
	}
}

func TestManifestTraps(t *testing.T) {
	t.Parallel()
	traps, err := ManifestTraps([]byte("src: a.tar\nchecksum: " + strings.Repeat("a", 32) + "\ndest: /d\ndest_mode: 755\ncommands:\n  failure: [./notify]\n"))
	if err != nil {
		t.Fatal(err)
	}
	text := Problems(traps).Error()
	for _, want := range []string{"manifest:4:12: dest_mode: 755 is read in octal", "md5", "file by file", "working directory"} {
		if !strings.Contains(text, want) {
			t.Errorf("the traps don't say %q:\n%s", want, text)
		}
	}
	traps, err = ManifestTraps([]byte("src: a.tar\nchecksum: " + hex64 + "\ndest: /home/app/current\nsync_strategy: release\n"))
	if err != nil || len(traps) != 1 || !strings.Contains(traps[0].Error(),
		"manifest:3:1: dest /home/app/current lies below") {
		t.Errorf("in a home: %v, %v", traps, err)
	}
	if traps, err := ManifestTraps([]byte("src: a.tar\nchecksum: " + hex64 + "\ndest: /d\nsync_strategy: release\n")); err != nil || len(traps) > 0 {
		t.Errorf("traps in a good manifest: %v, %v", traps, err)
	}
}

// Where variables aren't known, what holds one isn't checked, and everything else is.
func TestParseTemplate(t *testing.T) {
	t.Parallel()
	text := "src: a.tar\nchecksum: " + hex64 + "\ndest: '{{ must_env `ROOT` }}/app'\nhealth:\n  timeout: '{{ env `T` `5s` }}'\n  checks:\n  - http: '{{ must_env `SITE` }}/x'\n"
	m, err := ParseTemplate([]byte(text), manifestURL)
	if err != nil || m.Src != "s3://acme-releases/web/1.4.2/a.tar" || m.Dest != "" {
		t.Errorf("%+v, %v", m, err)
	}
	_, err = ParseTemplate([]byte(text+"keep: lots\n"), manifestURL)
	check(t, err, "manifest:8:7:")
	// One outcome of each condition is valid: it is one that has the field that follows.
	for _, condition := range []string{
		"{{ $s := env `S` }}{{ if eq $s `a` }}", "{{ $s := `` }}{{ $s = env `S` }}{{ if eq $s `a` }}",
		"{{ with env `S` }}{{ if eq . `a` }}{{ end }}{{ if eq . `a` }}", "{{ if env `S` | eq `a` }}",
	} {
		text := "src: a.tar\nchecksum: " + hex64 + "\n" + condition + "dest: /srv/app\n{{ end }}"
		if strings.Contains(condition, "with") {
			text += "{{ end }}"
		}
		if m, err := ParseTemplate([]byte(text), manifestURL); err != nil || m.Dest != "/srv/app" {
			t.Errorf("%s: %+v, %v", condition, m, err)
		}
	}
	// Conditions on one variable go together: an outcome is valid in which only one of eq and ne is true.
	for _, other := range []string{
		"{{ $t := env `T` }}{{ if ne $t `x` }}", "{{ $t := env `T` }}{{ if eq $t `x` }}", "{{ if eq (env `T`) `x` }}",
		"{{ if ne (env `T`) `x` }}",
	} {
		text := "src: a.tar\nchecksum: " + hex64 + "\n{{ $s := env `S` }}{{ if eq $s `a` }}dest: /srv/a\n{{ end }}" +
			"{{ if ne $s `a` }}dest: /srv/b\n{{ end }}" + other + "keep: 2\n{{ else }}keep: none\n{{ end }}"
		if m, err := ParseTemplate([]byte(text), manifestURL); err != nil || m.Keep != 2 {
			t.Errorf("%s: %+v, %v", other, m, err)
		}
	}
}

// A manifest is the same after it was written and read.
func TestManifestRoundTrip(t *testing.T) {
	t.Parallel()
	text := rapid.StringMatching(`[ -~]{0,30}[!-~]`)
	word := rapid.StringMatching(`[a-zA-Z0-9][a-zA-Z0-9._+~-]{0,12}`)
	span := rapid.Custom(func(t *rapid.T) time.Duration {
		return time.Duration(rapid.Int64Range(1, 1e6).Draw(t, "ms")) * time.Millisecond
	})
	commands := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Command {
		return Command{Run: strings.TrimSpace(text.Draw(t, "run")) + ".", Timeout: span.Draw(t, "timeout"), User: rapid.SampledFrom([]string{"", "www-data", "1000"}).Draw(t, "user"), Once: rapid.Bool().Draw(t, "once")}
	}), 0, 3)
	rapid.Check(t, func(t *rapid.T) {
		m := &Manifest{
			Name: word.Draw(t, "name"), Version: word.Draw(t, "version"), Src: "s3://acme-releases/web/1.4.2/a.tar.zst", Checksum: hex64,
			Size: rapid.Int64Range(1, 1<<40).Draw(t, "size"), Dest: "/srv/" + word.Draw(t, "dest"), DestMode: 0o750, Strategy: StrategyRelease, Keep: rapid.IntRange(1, 9).Draw(t, "keep"),
			Owner: "www-data:www-data", Immutable: rapid.Bool().Draw(t, "immutable"), Drain: span.Draw(t, "drain"), Shared: []string{"log", "public/up loads"},
			Symlinks: rapid.SampledFrom([]Symlinks{SymlinksInside, SymlinksAny}).Draw(t, "symlinks"),
			Index:    &Blob{URL: "s3://acme-releases/web/1.4.2/index", Size: 5, SHA256: Digest{1}},
			Deltas:   []Delta{{From: Digest{2}, Blob: Blob{URL: "s3://acme-releases/web/1.4.2/delta", Size: 6, SHA256: Digest{3}}}},
			Commands: Commands{Env: map[string]string{"RAILS_ENV": "production", "_x": text.Draw(t, "variable")}, Pre: commands.Draw(t, "pre"), Post: commands.Draw(t, "post"), Success: commands.Draw(t, "success"), Failure: commands.Draw(t, "failure")},
			Health: Health{Timeout: span.Draw(t, "health"), StableFor: span.Draw(t, "stable"), Every: span.Draw(t, "every"), Failures: rapid.IntRange(1, 9).Draw(t, "failures"), Checks: []Check{
				{HTTP: &HTTPCheck{URL: "http://127.0.0.1/x", Status: 204, Contains: strings.TrimSpace(text.Draw(t, "contains"))}, Interval: span.Draw(t, "interval"), Timeout: time.Second},
				{Exec: "true", User: "www-data", Interval: time.Second, Timeout: 5 * time.Second},
				{TCP: "localhost:80", Interval: time.Second, Timeout: 5 * time.Second, During: DuringDeploy},
			}},
		}
		data, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseManifest(data, manifestURL, nil)
		if strings.Contains(string(data), "{{") {
			return // it became a template
		}
		if err != nil {
			t.Fatalf("%v\n%s", err, data)
		}
		for _, list := range []*[]Command{&m.Commands.Pre, &m.Commands.Post, &m.Commands.Success, &m.Commands.Failure} {
			if len(*list) == 0 {
				*list = nil
			}
		}
		if !reflect.DeepEqual(again, m) {
			t.Fatalf("got  %+v\nwant %+v\n%s", again, m, data)
		}
	})
}

// What stretcher reads of YAML, and what comes of it.
func TestStretchersYAML(t *testing.T) {
	t.Parallel()
	base := "src: app.tar\nchecksum: " + hex64 + "\ndest: /srv/app\n"
	for _, c := range []struct{ name, text, same string }{
		{"lone dashes", base + "commands:\n  pre:\n    -\n  post:\n    -\n    - uptime\n    - ''\n    - ~\nexcludes:\n  -\n", base + "commands: {post: [uptime]}\n"},
		{"texts that are empty", base + "sync_strategy: \"\"\nexclude_from: ''\n", base},
		{"a src that is empty", "src: ''\ncommands: {pre: [uptime]}\n", "commands: {pre: [uptime]}\n"},
		{"an anchor for a list", base + "commands:\n  pre: &both\n  - uptime\n  post: *both\n", base + "commands: {pre: [uptime], post: [uptime]}\n"},
		{"an anchor for a text", base + "commands:\n  pre: [&a uptime, *a]\n", base + "commands: {pre: [uptime, uptime]}\n"},
		{"an anchor for fields", base + "x-base: &base\n  pre: [id]\n  post: [id]\ncommands:\n  <<: *base\n  post: [uptime]\n", base + "commands: {pre: [id], post: [uptime]}\n"},
		{"anchors of two", base + "x-a: &a {pre: [id], post: [id]}\nx-b: &b {post: [no], failure: [id]}\ncommands: {<<: [*a, *b]}\n", base + "commands: {pre: [id], post: [id], failure: [id]}\n"},
		{"a mode of four digits", base + "dest_mode: 02775\n", base + "dest_mode: 0775\n"},
		{"a mode with a sticky bit", base + "dest_mode: 01777\n", base + "dest_mode: 0777\n"},
		{"spaces", strings.Replace(base, "app.tar", "s3://b/my app.tar", 1), strings.Replace(base, "app.tar", "s3://b/my%20app.tar", 1)},
		{"this machine", strings.Replace(base, "app.tar", "file://localhost/srv/app.tar", 1), strings.Replace(base, "app.tar", "file:///srv/app.tar", 1)},
		{"a condition", base + "{{ if env `NONE` `` }}keep: 9{{ else }}excludes: [x]{{ end }}\n", base + "excludes: [x]\n"},
	} {
		got, err := ParseManifest([]byte(c.text), manifestURL, nil)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		want, err := ParseManifest([]byte(c.same), manifestURL, nil)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got  %+v\nwant %+v", c.name, got, want)
		}
	}
}

// stretcher has no timeouts: its manifests get a day. kedge's own get ten minutes, and can say another for all.
func TestCommandTimeouts(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][]time.Duration{
		"commands: {pre: [a]}": {24 * time.Hour},
		"commands: {pre: [a, {run: b, timeout: 1s}], timeout: 1h}":            {time.Hour, time.Second},
		"commands: {pre: [{run: b, timeout: 1s}, a]}":                         {time.Second, 24 * time.Hour},
		"x-note: none\ncommands: {pre: [a]}":                                  {24 * time.Hour},
		"name: app\ncommands: {pre: [a]}":                                     {DefaultCommandTimeout},
		"name: app\ncommands: {pre: [{run: a, timeout: 1s}, b], timeout: 2h}": {time.Second, 2 * time.Hour},
	} {
		m, err := ParseManifest([]byte(text), manifestURL, nil)
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		for i, c := range m.Commands.Pre {
			if c.Timeout != want[i] {
				t.Errorf("%s: command %s has %s, want %s", text, c.Run, c.Timeout, want[i])
			}
		}
		data, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := ParseManifest(data, manifestURL, nil); err != nil || !reflect.DeepEqual(again, m) {
			t.Errorf("%s is written as\n%s\nand is %+v, %v", text, data, again, err)
		}
	}
	traps, err := ManifestTraps([]byte("name: app\ncommands: {pre: [a]}\n"))
	if err != nil || len(traps) != 1 || !strings.Contains(traps[0].Message, "ended after 10m0s: commands.timeout") {
		t.Errorf("traps: %v, %v", traps, err)
	}
	for _, text := range []string{"commands: {pre: [a]}\n", "name: app\ncommands: {pre: [a], timeout: 1h}\n", "name: app\ncommands: {pre: [{run: a, timeout: 1h}]}\n"} {
		if traps, err := ManifestTraps([]byte(text)); err != nil || len(traps) > 0 {
			t.Errorf("%s has the traps %v, %v", text, traps, err)
		}
	}
}
