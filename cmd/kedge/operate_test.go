package main

import (
	"bufio"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode"

	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/agent/statedir"
)

// operateStore is a store as a mirror and two nodes leave it: prod/web/app had 1.0.0, and has 1.1.0.
func operateStore(t *testing.T) (flag string, pointers map[string]string) {
	t.Helper()
	dir := t.TempDir()
	pointers = map[string]string{}
	for version, digit := range map[string]string{"1.0.0": "1", "1.1.0": "2"} {
		pointers[version] = "s3://b/app/" + version + "/manifest.yaml@sha256:" + strings.Repeat(digit, 64)
	}
	report := func(node, version string) string {
		return `{"node": "` + node + `", "started": "2026-11-24T09:00:00Z", "ready": true, "units": {"app": {"state": "converged",
			"running": "` + pointers[version] + `", "version": "` + version + `", "since": "2026-11-24T09:00:00Z"}}}`
	}
	for key, value := range map[string]string{
		"desired/prod/web/app":      `{"target": "` + pointers["1.1.0"] + `", "generation": 2}`,
		"history/prod/web/app/0001": `{"generation": 1, "release": "` + pointers["1.0.0"] + `"}`,
		"history/prod/web/app/0002": `{"generation": 2, "release": "` + pointers["1.1.0"] + `"}`,
		"status/prod/web/web-1":     report("web-1", "1.1.0"),
		"status/prod/web/web-2":     report("web-2", "1.0.0"),
	} {
		path := filepath.Join(dir, key)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, folder := range []string{"pins", "control", "mirror"} {
		if err := os.MkdirAll(filepath.Join(dir, folder, "prod", "web"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return "--kv=file://" + dir, pointers
}

// A pin by version is the pointer that the unit had by it; one that it never had lists those that it had.
func TestPinByVersion(t *testing.T) {
	t.Parallel()
	store, pointers := operateStore(t)
	out, errs, code := cli(t, "", "pin", "prod/web/app", "1.0.0", "--json", "--reason", "incident 812", store)
	var told struct {
		Unit, Order, Outcome string
		Pin                  struct{ Release, Reason string }
		Notes                []string
	}
	if err := json.Unmarshal([]byte(out), &told); err != nil || code != exitDone {
		t.Fatalf("exit %d, %v: %s%s", code, err, out, errs)
	}
	if told.Unit != "prod/web/app" || told.Pin.Release != pointers["1.0.0"] || told.Pin.Reason != "incident 812" ||
		told.Outcome != "pinned" {
		t.Errorf("told is %+v", told)
	}
	pin, err := os.ReadFile(filepath.Join(strings.TrimPrefix(store, "--kv=file://"), "pins/prod/web/app"))
	if err != nil || !strings.Contains(string(pin), pointers["1.0.0"]) {
		t.Errorf("the pin is %s, %v", pin, err)
	}
	if _, errs, code := cli(
		t,
		"",
		"pin",
		"prod/web/app",
		"9.9.9",
		store,
	); code != exitFailed || !strings.Contains(errs, "1.1.0") ||
		!strings.Contains(errs, "1.0.0") {
		t.Errorf("exit %d: %s", code, errs)
	}
	out, errs, code = cli(t, "", "unpin", "prod/web/app", "--json", store)
	if code != exitDone || !strings.Contains(out, `"outcome": "unpinned"`) || errs != "" {
		t.Errorf("exit %d: %s%s", code, out, errs)
	}
}

// A node is shown with all its units; a unit is explained on the node that is most worth a look.
func TestNodeAndExplainWithoutNode(t *testing.T) {
	t.Parallel()
	store, _ := operateStore(t)
	out, errs, code := cli(t, "", "node", "web-2", store)
	if code != exitDone || !strings.Contains(out, "prod/web/app") || !strings.Contains(out, "runs 1.0.0") {
		t.Errorf("exit %d: %s%s", code, out, errs)
	}
	out, _, code = cli(t, "", "node", "web-2", "--json", store)
	if code != exitDone || !strings.Contains(out, `"unit": "prod/web/app"`) {
		t.Errorf("exit %d: %s", code, out)
	}
	out, errs, code = cli(t, "", "explain", "prod/web/app", store)
	if code != exitDone || !strings.Contains(errs, "one of 2 nodes; another: kedge explain prod/web/app NODE") ||
		!strings.Contains(out, "web-") {
		t.Errorf("exit %d: %s%s", code, out, errs)
	}
}

// An agent whose roles share a unit's name is asked about one of them as ROLE/UNIT. Any other A/B is NODE/UNIT.
func TestExplainRole(t *testing.T) {
	t.Parallel()
	store, _ := operateStore(t)
	dir := t.TempDir()
	app := deployments.Report{Units: map[string]deployments.UnitReport{"app": {}}}
	l, err := net.Listen("unix", statedir.SocketPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		json.NewEncoder(w).Encode(policy.NodeStatus{
			Node: "here", Stage: "prod", Roles: map[string]deployments.Report{"web": app, "db": app},
		})
	}))
	server.Listener.Close()
	server.Listener = l
	server.Start()
	t.Cleanup(server.Close)
	for _, c := range []struct {
		arg, says string
		code      int
	}{
		{"app", "want one of db/app, web/app", exitFailed},
		{"web/app", "prod/web/app on here", exitDone},
		{"db/app", "prod/db/app on here", exitDone},
		{"db/base", "no unit db/base on this node: there are db/app, web/app", exitFailed},
		{"web-2/app", "prod/web/app on web-2", exitDone},
	} {
		out, errs, code := cli(t, "", "explain", c.arg, "--state-dir", dir, store)
		if code != c.code || !strings.Contains(strings.Join(strings.Fields(out+errs), " "), c.says) {
			t.Errorf("%s: exit %d, want %d and %q: %s%s", c.arg, code, c.code, c.says, out, errs)
		}
	}
}

// The shell completes units, parts, nodes, releases and flags' values from what the store has.
func TestCompletion(t *testing.T) {
	t.Parallel()
	store, _ := operateStore(t)
	for line, want := range map[string]string{
		"promote|":                      "prod/web/app",
		"status|":                       "prod prod/web prod/web/app",
		"status|prod":                   "prod prod/web prod/web/app",
		"wait|prod/web/":                "prod/web/app",
		"node|web-":                     "",
		"explain|prod/web/app|":         "",
		"pin|prod/web/app|1":            "1.1.0 1.0.0",
		"pin|prod/web/app|":             "1.1.0 1.0.0 hold",
		"pin|prod/web/app|hold|--node|": "",
		"--log-level|":                  "debug info warn error",
		"history|staging":               "",
		"acl|m":                         "maintenance mirror",
		"promote|prod/web/app|":         "",
		"unpin|prod/web/app|--node|web": "",
	} {
		if strings.Contains(line, "node") || strings.HasPrefix(line, "explain") {
			want = "web-1 web-2"
		}
		words := strings.Split(line, "|")
		args := append([]string{"__complete", store}, words...)
		out, _, code := cli(t, "", args...)
		var got []string
		for candidate := range strings.Lines(out) {
			if name, _, _ := strings.Cut(
				strings.TrimSuffix(candidate, "\n"),
				"\t",
			); name != "" &&
				!strings.HasPrefix(name, ":") {
				got = append(got, name)
			}
		}
		if strings.Join(got, " ") != want || code != exitDone {
			t.Errorf("%s: exit %d, %q; want %q", line, code, got, want)
		}
	}
}

// A program never meets null where a list may be empty.
func TestEmptyListsInJSON(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, args := range [][]string{{"status"}, {"status", "-a"}, {"check", dir}} {
		out, errs, code := cli(t, "", append(args, "--json", "--kv=file://"+dir)...)
		if code != exitDone || !strings.Contains(out, "[]") || strings.Contains(out, "null") {
			t.Errorf("%s: exit %d\n%s%s", args[0], code, out, errs)
		}
	}
	store, _ := operateStore(t)
	for _, args := range [][]string{
		{"status"}, {"status", "-a"}, {"history", "prod/web/app"}, {"explain", "web-1/app"}, {"node", "web-1"},
		{"unpin", "prod/web/app"},
	} {
		out, errs, code := cli(t, "", append(args, "--json", store)...)
		if code != exitDone || strings.Contains(out, "null") || !json.Valid([]byte(out)) {
			t.Errorf("%s: exit %d\n%s%s", args[0], code, out, errs)
		}
	}
}

// A variable that begins with KEDGE_ and means nothing is told, with what was meant.
func TestCheckVariables(t *testing.T) {
	t.Parallel()
	err := checkVariables(
		[]string{"KEDGE_DEST_=/srv", "KEDGE_STAGE=prod", "KEDGE_SOURCE=s3://b", "KEDGE_GIT_TOKEN=x", "PATH=/bin"},
	)
	if err == nil || !strings.Contains(err.Error(), "KEDGE_DEST_") || !strings.Contains(err.Error(), "KEDGE_SOURCE: did you mean KEDGE_SOURCES?") ||
		strings.Contains(err.Error(), "STAGE") ||
		strings.Contains(err.Error(), "TOKEN") {
		t.Errorf("checkVariables says %v", err)
	}
	// A command of a release may start an agent: what it was given is no mistake there.
	if err := checkVariables([]string{"KEDGE_DEST=/srv", "KEDGE_RUN=1"}); err != nil {
		t.Error(err)
	}
	if err := checkVariables([]string{"KEDGE_DEST=/srv"}); err == nil ||
		!strings.Contains(err.Error(), "KEDGE_DEST: did you mean KEDGE_DESTS?") {
		t.Errorf("a bound that was mistyped: %v", err)
	}
}

// Every command but the daemons, which refuse it, warns of a mistyped variable, and only of that: scripts have
// their own.
func TestMistypedVariablesAreToldOf(t *testing.T) {
	t.Parallel()
	store, _ := operateStore(t)
	for _, test := range []struct{ variable, want string }{
		{"KEDGE_PREFX=other/", "KEDGE_PREFX has no effect: did you mean KEDGE_PREFIX?"},
		{"KEDGE_DASHBOARD=https://kedge.acme.example", ""},
		{"KEDGE_VERSION=1.4.2", ""},
	} {
		c := exec.CommandContext(t.Context(), testedProgram(t), "status", "--json", store)
		c.Env = append(baseEnv(), test.variable)
		var errs strings.Builder
		c.Stderr = &errs
		out, err := c.Output()
		told := strings.Join(strings.Fields(errs.String()), " ")
		if err != nil || !json.Valid(out) || !strings.Contains(told, test.want) || (told == "") != (test.want == "") {
			t.Errorf("with %s: %v, says %q", test.variable, err, told)
		}
	}
}

// Whatever nodes, operators and Git say: nothing that a terminal would obey, or that changes the order of what is read,
// comes out of --json.
func TestJSONShowsNoControlCharacters(t *testing.T) {
	t.Parallel()
	store, pointers := operateStore(t)
	dir := strings.TrimPrefix(store, "--kv=file://")
	evil := "\u202eevil\u2066 \u009b2J \u200b"
	quoted, err := json.Marshal(evil + "\x1b[2J")
	if err != nil {
		t.Fatal(err)
	}
	for key, value := range map[string]string{
		"pins/prod/web/app":         `{"release": "` + pointers["1.0.0"] + `", "by": "` + evil + `", "reason": "` + evil + `"}`,
		"history/prod/web/app/0002": `{"generation": 2, "release": "` + pointers["1.1.0"] + `", "author": ` + string(quoted) + `, "note": ` + string(quoted) + `}`,
		"status/prod/web/web-1": `{"node": "web-1", "ready": false, "units": {"app": {"state": ` + string(quoted) + `, "running": "` + pointers["1.1.0"] + `", "version": ` + string(quoted) +
			`, "error": ` + string(quoted) + `, "message": ` + string(quoted) + `, "drift": [` + string(quoted) + `]}}}`,
		"mirror/state": `{"holder": ` + string(quoted) + `, "head": "x", "error": ` + string(quoted) + `}`,
	} {
		path := filepath.Join(dir, key)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	unseen := func(r rune) bool { return r != '\n' && (unicode.IsControl(r) || unicode.Is(unicode.Cf, r)) }
	said := 0
	for _, args := range [][]string{{"status"}, {"status", "--nodes"}, {"history", "prod/web/app"}, {"explain", "prod/web/app", "web-1"}, {"node", "web-1"},
		{"pin", "prod/web/app", "hold", "--reason", evil}} {
		for _, flag := range []string{"--json", ""} {
			given := append(args[:len(args):len(args)], store)
			if flag != "" {
				given = append(given, flag)
			}
			out, errs, _ := cli(t, "", given...)
			if i := strings.IndexFunc(out+errs, unseen); i >= 0 {
				t.Errorf("%q prints %.60q", given, (out + errs)[i:])
			}
			if strings.Contains(out, "evil") {
				said++
			}
		}
	}
	line := firstLine(t, "status", "--json", "--watch", store)
	if i := strings.IndexFunc(line, unseen); i >= 0 || !strings.Contains(line, "evil") {
		t.Errorf("status --json --watch prints %.60q of %q", line[max(0, i):], line)
	}
	if said < 6 {
		t.Errorf("%d commands say what was written, too few to tell", said)
	}
}

// firstLine runs a command that goes on until it is ended, and returns the first line that it prints.
func firstLine(t *testing.T, args ...string) string {
	t.Helper()
	c := exec.CommandContext(t.Context(), testedProgram(t), args...)
	c.Env = baseEnv()
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Errorf("%q prints no line: %v", args, err)
	}
	_ = c.Process.Kill()
	_ = c.Wait()
	return line
}
