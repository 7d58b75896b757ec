package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"kedge/deployments"
)

// cli runs a command in this process, with nothing on standard input.
func cli(t *testing.T, stdin string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(args, strings.NewReader(stdin), &out, &errs)
	return out.String(), errs.String(), code
}

func TestExitCodesAndErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	store := "--kv=file://" + filepath.Join(dir, "kv")
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("bad/prod/web/app.yaml", "release: x\nrelaese: y\n")
	write("good/prod/web/app.yaml", "release: s3://b/app/1/manifest.yaml@sha256:"+strings.Repeat("0", 64)+"\n")
	for i := range deployments.MaxRoleUnits + 1 {
		write(
			fmt.Sprintf("crowded/prod/web/u%d.yaml", i),
			"release: s3://b/app/1/manifest.yaml@sha256:"+strings.Repeat("0", 64)+"\n",
		)
	}
	write("bounded/kedge.yaml", "dests: {prod: [/srv]}\n")
	wrong := write("wrong.yml", "nmae: a\nverison: 1\n")
	outside := write("manifests/1.yml", "src: s3://b/a.tar.gz\nchecksum: "+strings.Repeat("a", 64)+"\ndest: /etc/a\n")
	digest := sha256.Sum256([]byte("src: s3://b/a.tar.gz\nchecksum: " + strings.Repeat("a", 64) + "\ndest: /etc/a\n"))
	write("bounded/prod/web/app.yaml", "release: file://"+outside+"@sha256:"+hex.EncodeToString(digest[:])+"\n")
	empty, bare := filepath.Join(dir, "empty"), filepath.Join(dir, "bad.git")
	for _, made := range []string{empty, filepath.Join(dir, "kv")} {
		if err := os.MkdirAll(made, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write("work/prod/web/app.yaml", "relaese: y\n")
	for _, args := range [][]string{
		{"init", "-q", "-b", "main"}, {"add", "."}, {"-c", "user.name=Dev", "-c", "user.email=dev@example.com", "commit", "-qm", "a typo"}, {"clone", "-q", "--bare", ".", bare},
	} {
		git := exec.Command("git", append([]string{"-C", filepath.Join(dir, "work")}, args...)...)
		git.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null")
		if out, err := git.CombinedOutput(); err != nil {
			t.Fatalf("git %s: %v\n%s", args[0], err, out)
		}
	}
	trapped := write(
		"old.yml",
		"src: s3://b/a.tar.gz\nchecksum: "+strings.Repeat("a", 32)+"\ndest: /srv/a\ndest_mode: 755\n",
	)
	for _, c := range []struct {
		args []string
		code int
		says []string
	}{
		{[]string{"--help"}, exitDone, []string{"kedge demo", "Exit codes"}},
		{[]string{"nonsense"}, exitUsage, []string{`unknown command "nonsense"`}},
		{[]string{"help", "wait"}, exitDone, []string{"kedge wait [STAGE", "--help"}},
		{[]string{"help", "statsu"}, exitUsage, []string{"did you mean status?"}},
		{[]string{"help", "instal"}, exitUsage, []string{`no command or topic "instal": did you mean install?`}},
		{[]string{"help", "nowhere"}, exitUsage, []string{`no command or topic "nowhere"`, "kedge help lists them"}},
		{[]string{"web", "--listen", "7080", store}, exitUsage, []string{`--listen "7080": want an address`}},
		{[]string{"mirror", dir, "--listen", "7080", store}, exitUsage, []string{`--listen "7080": want an address`}},
		{[]string{"statsu"}, exitUsage, []string{"did you mean status?"}},
		{[]string{"version", "x"}, exitUsage, []string{"want kedge version"}},
		{[]string{"acl", "nobody"}, exitUsage, []string{"agent, bridge, maintenance, mirror, operator, web"}},
		{[]string{"acl", "agent", "--stage", "prod", "--node", "web-1"}, exitUsage, []string{"--stage, --roles, --node"}},
		{[]string{"acl", "agent", "--stage", "prod", "--roles", "a/b", "--node", "web-1"}, exitUsage, []string{"--roles"}},
		{[]string{"status", "--nonsense"}, exitUsage, []string{"unknown flag", "see kedge status --help"}},
		{[]string{"status", "a/b/c/d"}, exitUsage, []string{"want STAGE, STAGE/ROLE or STAGE/ROLE/UNIT"}},
		{[]string{"pin", "prod/web/app"}, exitUsage, []string{"1 argument given", "kedge pin STAGE/ROLE/UNIT"}},
		{[]string{"pin", "prod/web/app", "hodl", store}, exitFailed, []string{"no unit prod/web/app"}},
		{[]string{"pin", "prod/web/app", "s3://b/x", store}, exitUsage, []string{"neither a pointer nor hold"}},
		{[]string{"pin", "prod/web", "hold", store}, exitUsage, []string{"want STAGE/ROLE/UNIT"}},
		{[]string{"pin", "prod/web/app", "hold", "--until", "tomorrow", store}, exitUsage, []string{"want a duration"}},
		{[]string{"pin", "prod/web/app", "hold", "--until", "17:00", store}, exitUsage, []string{"a time with its zone"}},
		{[]string{"explain", "prod/web/app", store}, exitFailed, []string{"no unit prod/web/app"}},
		{[]string{"node", "web-1", store}, exitFailed, []string{"no node web-1 has reported"}},
		{[]string{"explain", "app", "--state-dir", dir}, exitFailed, []string{"no agent answers at " + dir, "does kedge-agent run on this machine"}},
		{[]string{"explain", "web-1/app", store}, exitFailed, []string{"no node web-1 has reported, and no other has"}},
		{[]string{"explain", "prod/web/app", "web-1", store}, exitFailed, []string{"no unit prod/web/app: the store has none yet"}},
		{[]string{"promote", "prod/web/app", store}, exitFailed, []string{"no unit prod/web/app"}},
		{[]string{"history", "prod/web/app", store}, exitFailed, []string{"no unit prod/web/app"}},
		{[]string{"status", "prod/web/app", store}, exitDone, []string{"No units.", "no unit prod/web/app"}},
		{[]string{"check", filepath.Join(dir, "nowhere")}, exitFailed, []string{
			"there is no directory " + filepath.Join(dir, "nowhere"),
		}},
		{[]string{"mirror", filepath.Join(dir, "nowhere.git"), store}, exitFailed, []string{
			"repository " + filepath.Join(dir, "nowhere.git") + ": no such file", "check the path for a typo",
			"git init --bare -b main", "If Consul has lost its data: mount the repository again",
		}},
		{[]string{"mirror", empty, store}, exitFailed, []string{empty + " is not a Git repository"}},
		{
			[]string{"agent", "--stage", "a/b", "--roles", "web,c/d", "--mirrors", "x=y", "--snapshot", "s3://b/x"}, exitUsage,
			[]string{`--stage: stage "a/b"`, `--roles: role "c/d"`, "--mirrors: ", "--snapshot: a snapshot needs"},
		},
		{[]string{"check", "--manifest", trapped, wrong}, exitFailed,
			[]string{"old.yml:4:12", "wrong.yml:1:1", "2 problems in some of 2 manifests"}},
		{[]string{"check", "--manifest", filepath.Dir(outside) + "/"}, exitDone, []string{"manifests/1.yml: valid"}},
		{[]string{"check", "--fix"}, exitUsage, []string{"are for --manifest"}},
		{[]string{"check", "a", "b"}, exitUsage, []string{"2 arguments given"}},
		{[]string{"check", "--fix", "--manifest", write("fix.yml", "dest: /srv/a\ndest_mode: 755\n")}, exitDone,
			[]string{"changed dest_mode from 755 to 0755"}},
		{ // the default timeout is told
			[]string{"check", "--manifest", write("own.yml", "name: app\ndest: /srv/a\ncommands: {post: [bin/migrate]}\n")},
			exitDone, []string{"commands without a timeout of their own are ended after 10m"},
		},
		{[]string{"import", "s3://b/x/"}, exitUsage, []string{"--repo is missing"}},
		{[]string{"import", "file://" + empty, "--repo", empty}, exitFailed,
			[]string{"has a name that gives a unit by --match"}},
		{[]string{"bridge", "s3://b/x.yml"}, exitUsage, []string{"--to is missing"}},
		{[]string{"bridge", "s3://b/x.yml", "--to", "s3://b", store}, exitFailed, []string{"gives no unit"}},
		{[]string{"check", trapped}, exitUsage, []string{"--manifest " + trapped}},
		{[]string{"check", empty}, exitDone, []string{"it has no units"}},
		{[]string{"diff", empty, store}, exitFailed, []string{empty + " is not in a Git repository"}},
		{[]string{"agent", store}, exitUsage, []string{"stage and roles are not set"}},
		{[]string{"agent", "--stage", "prod", store}, exitUsage, []string{"this node's roles are not set"}},
		{[]string{"agent", "--config", filepath.Join(dir, "nowhere.yaml")}, exitUsage, []string{"nowhere.yaml"}},
		{[]string{"agent", "--config", write("field.yaml", "stage: prod\nrole: web\n")}, exitUsage, []string{`field.yaml:2:1: unknown field "role": did you mean "roles"?`}},
		{[]string{"agent", "--config", write("bool.yaml", "stage: prod\nno_commands: maybe\n")}, exitUsage, []string{`bool.yaml:2:14: "maybe": want true or false`}},
		{
			[]string{"agent", "--config", write("flow.yaml", "stage: prod\nmirrors: {s3://b/: [http://h:80/]}\n")},
			exitUsage, []string{"flow.yaml:2:", `want a text here, not fields: put texts that contain a colon`},
		},
		{
			[]string{"agent", "--config", write("ipv6.yaml", "stage: prod\nsources: [http://[::1]:80/]\n")},
			exitUsage, []string{"ipv6.yaml:2:", "must be specified: put texts that contain a colon or a bracket in quotes"},
		},
		{[]string{"agent", "--config", write("time.yaml", "ready_timeout: 5\n")}, exitUsage,
			[]string{`time.yaml:1:1: "5": want a duration of 0 or more, as in 30s`}},
		{[]string{"agent", "--start-delay", "1s", "--config", write("all.yaml", "stage: prod\nrole: web\nstage: x\nno_commands: maybe\nready_timeout: 5\ndests: {a: b}\n")}, exitUsage, []string{
			`all.yaml:2:1: unknown field "role"`, `all.yaml:3:1: the field "stage" is given twice`, "all.yaml:4:14",
			"all.yaml:5:1", "all.yaml:6:",
		}},
		{
			[]string{"agent", "--config", write("values.yaml", "listen: 7070\nverify: often\nmax_bandwidth: fast\n")},
			exitUsage, []string{
				`values.yaml:1:1: listen: "7070": want an address`, `values.yaml:2:1: verify: "often"`,
				`values.yaml:3:1: max_bandwidth: bandwidth "fast"`,
			},
		},
		{[]string{"publish", dir, "--to", "s3://b", "--name", "-app", "--version", "1", "--dest", "/srv/a"}, exitUsage,
			[]string{`--name: "-app": want`}},
		{[]string{"publish", dir, "--to", "s3://b", "--name", "app", "--version", "1/2", "--dest", "/srv/a"}, exitUsage,
			[]string{`--version: "1/2": want`}},
		{[]string{"publish", dir, "--to", "s3://b", "--name", "app", "--version", "1", "--dest", "srv/a"}, exitUsage,
			[]string{`--dest: "srv/a": want an absolute path`}},
		{[]string{"agent", "--config", write("words.yaml", "roles: web, db\n")}, exitUsage, []string{"stage is not set", "words.yaml"}},
		{[]string{"check", filepath.Join(dir, "bad")}, exitFailed, []string{"prod/web/app.yaml:1:10:", "prod/web/app.yaml:2:1:", "2 problems"}},
		{[]string{"check", filepath.Join(dir, "good")}, exitDone, []string{"1 unit, all valid"}},
		{[]string{"check", filepath.Join(dir, "crowded")}, exitDone,
			[]string{"prod/web has 101 units: a node runs at most 100", "101 units, all valid"}},
		{[]string{"check", filepath.Join(dir, "bounded")}, exitDone, []string{"1 unit, all valid", "--releases checks that"}},
		{[]string{"check", "--releases", filepath.Join(dir, "bounded")}, exitFailed, []string{"prod/web/app.yaml:1:10: the release does what kedge.yaml does not allow for stage prod: dest /etc/a is outside of /srv", "1 problem"}},
		{[]string{"check", "--signers", write("signers", ""), filepath.Join(dir, "bounded")}, exitFailed,
			[]string{"prod/web/app.yaml:1:10: could not read or verify the release: not signed by an allowed signer: file://" +
				outside + " has no signature"}},
		{[]string{"check", "--manifest", trapped}, exitDone, []string{"old.yml:4:12: dest_mode: 755 is read in octal", "3 traps"}},
		{[]string{"check", "--manifest", wrong}, exitFailed, []string{"wrong.yml:1:1: unknown field", "wrong.yml:2:1: unknown field", "2 problems"}},
		{[]string{"check", "--manifest", wrong, "--json"}, exitFailed, []string{`"line": 2`, "2 problems"}},
		{[]string{"run", "https://u:secret@h/x"}, exitFailed, []string{`manifest "https://…@h/x": the URL carries`}},
		{[]string{"run", "s3://b/x", "--max-bandwidth", "fast"}, exitUsage, []string{`bandwidth "fast"`}},
		{[]string{"run"}, exitUsage, []string{"standard input is empty"}},
		{[]string{"verify", dir}, exitFailed, []string{"no release that kedge made"}},
		{[]string{"wait", "--ready", "127.0.0.1:1", "--timeout", "300ms"}, exitNotConverged, []string{"not converged in time", "refused"}},
		{[]string{"mirror", empty, "--lease-ttl", "2s", "--kv", "consul"}, exitUsage, []string{"Consul accepts 10s to 24h"}},
		{[]string{"wait", "--commit", "main", store}, exitUsage, []string{"want its hash"}},
		{[]string{"wait", "--timeout", "-1s", store}, exitUsage, []string{"want a time to wait"}},
		{[]string{"publish", dir, "--name", "a", "--version", "1", "--dest", "/d"}, exitUsage, []string{"--to is missing"}},
		{[]string{"--kv", "redis://x", "status"}, exitUsage, []string{"redis://x"}},
		{[]string{"--prefix", "/x", "status"}, exitUsage, []string{`"/x/"`}},
		{[]string{"--kv", "file://" + filepath.Join(dir, "typo"), "status"}, exitFailed,
			[]string{"no such file or directory"}},
		{[]string{"check", bare}, exitFailed, []string{"prod/web/app.yaml:1:1", "relaese"}},
	} {
		t.Run(strings.Join(c.args[:min(2, len(c.args))], " "), func(t *testing.T) {
			out, errs, code := cli(t, "", c.args...)
			if code != c.code {
				t.Errorf("exit %d, want %d", code, c.code)
			}
			for _, want := range c.says {
				if !strings.Contains(out+errs, want) {
					t.Errorf("%q is not in\n%s%s", want, out, errs)
				}
			}
		})
	}
}

// With --json standard output holds JSON alone: a manifest that --fix adapts has no room beside it.
func TestFixedManifestIsNotPrintedBesideJSON(t *testing.T) {
	t.Parallel()
	manifest := "dest: /srv/a\ndest_mode: 755\n"
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, manifest)
	}))
	t.Cleanup(site.Close)
	for _, name := range []string{"-", site.URL + "/a.yml"} {
		out, errs, code := cli(t, manifest, "check", "--json", "--fix", "--manifest", name)
		if code != exitUsage || out != "" || !strings.Contains(errs, "leave out --json") || !strings.Contains(errs, name) {
			t.Errorf("%s: exit %d\n%s%s", name, code, out, errs)
		}
	}
	file := filepath.Join(t.TempDir(), "a.yml")
	if err := os.WriteFile(file, []byte(manifest), 0o644); err != nil {
		t.Fatal(err)
	}
	out, errs, code := cli(t, "", "check", "--json", "--fix", "--manifest", file)
	if code != exitDone || !json.Valid([]byte(out)) {
		t.Errorf("a file: exit %d\n%s%s", code, out, errs)
	}
}

func TestAgentConfig(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "agent.yaml")
	text := "stage: prod\nroles: web, db\ndests: [/srv, /opt]\nno_commands: true\nready_timeout: \"40s\"\nstart_delay: 5s\nverify_every: 0s\nverify: always\n"
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	c, err := readAgentConfig(file, origins{})
	if err == nil {
		err = override(&c, (&app{}).agentCommand().Flags(), origins{})
	}
	want := agentDefaults()
	want.Stage, want.Roles, want.Dests, want.NoCommands = "prod", words{"web", "db"}, words{"/srv", "/opt"}, true
	want.ReadyTimeout, want.StartDelay, want.VerifyEvery, want.Verify = 40*time.Second, 5*time.Second, 0, "always"
	if err != nil || !reflect.DeepEqual(c, want) {
		t.Errorf("%+v, %v\nwant %+v", c, err, want)
	}
}

// What observe names: all units, some, or none. A text that names none is a mistake, as nothing would be observed.
func TestObservedUnits(t *testing.T) {
	t.Parallel()
	for flag, want := range map[string]unitPatterns{
		"":                                  nil,
		"--observe":                         {"*/*/*"},
		"--observe=true":                    {"*/*/*"},
		"--observe=false":                   nil,
		"--observe=prod/web/app, */db/base": {"prod/web/app", "*/db/base"},
	} {
		var c agentConfig
		flags := (&app{}).agentCommand().Flags()
		err := errors.Join(flags.Parse([]string{flag}), override(&c, flags, origins{}))
		if err != nil || !slices.Equal(c.Observe, want) {
			t.Errorf("%s: %q, %v", flag, c.Observe, err)
		}
	}
	for _, flag := range []string{"--observe=", "--observe=app", "--observe=web/app", "--observe=prod/web/ap*"} {
		var c agentConfig
		flags := (&app{}).agentCommand().Flags()
		if err := errors.Join(flags.Parse([]string{flag}), override(&c, flags, origins{})); err == nil {
			t.Errorf("%s: %q", flag, c.Observe)
		}
	}
	for text, want := range map[string]unitPatterns{
		"true": {"*/*/*"}, "false": nil, "[]": nil, "": nil, "prod/web/app": {"prod/web/app"},
		"[prod/web/app, '*/db/*']": {"prod/web/app", "*/db/*"},
	} {
		var c agentConfig
		err := decodeAgentConfig("agent.yaml", []byte("observe: "+text), &c, origins{})
		if err != nil || !slices.Equal(c.Observe, want) {
			t.Errorf("observe: %s: %q, %v", text, c.Observe, err)
		}
	}
	for _, text := range []string{"''", "app", "[app]", "[[prod/web/app]]", "{prod: web}"} {
		var c agentConfig
		err := decodeAgentConfig("agent.yaml", []byte("observe: "+text), &c, origins{})
		if err == nil || !strings.Contains(err.Error(), "agent.yaml:1:") {
			t.Errorf("observe: %s: %q, %v", text, c.Observe, err)
		}
	}
}

// Every manual fits a terminal of 80 columns.
func TestHelpFits(t *testing.T) {
	t.Parallel()
	root := newRoot(&app{})
	names := []string{""}
	for _, c := range root.Commands() {
		names = append(names, c.Name())
	}
	for _, name := range names {
		out, _, code := cli(t, "", strings.Fields(name+" --help")...)
		if code != exitDone || !strings.Contains(out, "Usage:") {
			t.Errorf("%s: exit %d, %q", name, code, out)
		}
		for line := range strings.Lines(out) {
			example := strings.HasPrefix(line, "  ") && strings.Contains(line, "kedge ") // in one piece, to be copied
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 80 && !example {
				t.Errorf("%s --help: a line of %d columns: %s", name, n, line)
			}
		}
	}
}

func TestUntil(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	for text, want := range map[string]string{
		"2h":                             "2026-11-24T14:00:00Z",
		"3d":                             "2026-11-27T12:00:00Z",
		"2026-11-25 09:00 Europe/Berlin": "2026-11-25T08:00:00Z",
		"2026-11-25T09:00:00Z":           "2026-11-25T09:00:00Z",
		"tomorrow":                       "",
		"17:00":                          "",
		"-1h":                            "",
		"0d":                             "",
		"2026-11-24T11:00:00Z":           "",
		"1.5d":                           "",
		"213505d":                        "",
	} {
		at, err := untilOf(text, now)
		if got := at.UTC().Format(time.RFC3339); (err == nil) != (want != "") || err == nil && got != want {
			t.Errorf("%s: %s, %v; want %s", text, got, err, want)
		}
	}
}

// A release is published from the command line, run once, verified, and verified again after somebody changed it.
func TestPublishRunVerify(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	tree, dest := filepath.Join(dir, "tree"), filepath.Join(dir, "srv", "app")
	writeTree(t, tree, "1")
	template := filepath.Join(dir, "manifest.yaml")
	if err := os.WriteFile(
		template,
		fmt.Appendf(nil, "# kept as it is\nowner: '{{ env `NOBODY_SETS_THIS` `%d` }}'\n", os.Getuid()),
		0o644,
	); err != nil {
		t.Fatal(err)
	}
	publish := []string{
		"publish",
		tree,
		"--to",
		"file://" + dir + "/releases",
		"--name",
		"app",
		"--version",
		"1",
		"--dest",
		dest,
		"--manifest",
		template,
	}
	out, errs, code := cli(t, "", publish...)
	if code != exitDone {
		t.Fatalf("publish: exit %d\n%s", code, errs)
	}
	pointer, err := deployments.ParsePointer(out)
	if err != nil {
		t.Fatal(err)
	}
	if again, _, _ := cli(t, "", publish...); again != out {
		t.Errorf("published again it is %s, was %s", again, out)
	}
	if _, errs, code := cli(t, pointer.String()+"\n", "run"); code != exitDone {
		t.Fatalf("run: exit %d\n%s", code, errs)
	}
	if v, err := readTree(dest); err != nil || v != "1" {
		t.Errorf("%q, %v is live", v, err)
	}
	if _, errs, code := cli(t, "", "verify", dest); code != exitDone || !strings.Contains(errs, "as published") {
		t.Errorf("verify: exit %d\n%s", code, errs)
	}
	evil := filepath.Join(dest, "d0", "evil\x1b[2J\nnext")
	if err := os.WriteFile(evil, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if out, _, _ := cli(t, "", "verify", dest); out != "extra    d0/evil [2J next\n" {
		t.Errorf("verify prints %q", out)
	}
	if err := os.Remove(evil); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dest, "d0", "f0"), []byte("changed\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out, errs, code = cli(t, "", "verify", dest, "--json")
	var differences []struct{ Path, What string }
	if err := json.Unmarshal(
		[]byte(out),
		&differences,
	); err != nil || code != exitFailed || len(differences) != 1 ||
		differences[0].Path != "d0/f0" {
		t.Errorf("verify: exit %d, %v\n%s%s", code, err, out, errs)
	}
	pointer.Digest[0]++
	if _, errs, code := cli(t, "", "run", pointer.String()); code != exitFailed || !strings.Contains(errs, "digest") {
		t.Errorf("run of another digest: exit %d\n%s", code, errs)
	}
}

// Names in a repo, in a tree and in errors are others' choice: none may move the cursor of who reads them.
func TestErrorsShowNoControlCharacters(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "prod", "web", "evil\x1b[2J.yaml")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("release: x\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"check", dir}, {"check", filepath.Join(dir, "evil\x1b[2J")}, {"verify", "/evil\x1b]0;owned\a"},
	} {
		out, errs, code := cli(t, "", args...)
		if code != exitFailed || !strings.Contains(out+errs, "evil") || strings.ContainsAny(out+errs, "\x1b\a") {
			t.Errorf("%q: exit %d\n%q\n%q", args, code, out, errs)
		}
	}
}
