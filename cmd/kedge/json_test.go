package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Every command that tells something has --json, whose schema kedge schema prints.
func TestEveryCommandHasJSON(t *testing.T) {
	t.Parallel()
	// Daemons log; run and bridge stand in stretcher's place, and log; acl and schema print a file of another format.
	others := strings.Fields("agent mirror web demo run bridge acl schema help completion")
	kinds := map[string]string{}
	for _, verb := range strings.Fields("promote pause resume abort retry pin unpin rollback") {
		kinds[verb] = "order"
	}
	for _, c := range newRoot(&app{}).Commands() {
		kind := c.Name()
		if kinds[kind] != "" {
			kind = kinds[kind]
		}
		switch has := c.Flags().Lookup("json") != nil; {
		case has == slices.Contains(others, c.Name()):
			t.Errorf("kedge %s has --json: %v", c.Name(), has)
		case has && printed[kind].value == nil:
			t.Errorf("nothing says what kedge %s --json prints", c.Name())
		}
	}
}

// What commands print with --json is as its schema says, and an empty list is [], on a store with and without units.
func TestPrintedJSON(t *testing.T) {
	t.Parallel()
	store, pointers := operateStore(t)
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	bare := "--kv=file://" + filepath.Dir(write("kv/pins/.keep", ""))
	bare = strings.TrimSuffix(bare, "/pins")
	repo := filepath.Join(dir, "repo")
	write("repo/prod/web/app.yaml", "release: "+pointers["1.1.0"]+"\nrollout: {canary: 1}\n")
	write("repo/prod/web/new.yaml", "release: "+pointers["1.1.0"]+"\n")
	for _, args := range [][]string{
		{"init", "-q", "-b", "main"}, {"add", "."},
		{"-c", "user.name=Dev", "-c", "user.email=dev@example.com", "commit", "-qm", "one"},
	} {
		git := exec.Command("git", append([]string{"-C", repo}, args...)...)
		git.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null")
		if out, err := git.CombinedOutput(); err != nil {
			t.Fatalf("git %s: %v\n%s", args[0], err, out)
		}
	}
	bad := filepath.Dir(write("bad/kedge.yaml", "prune: maybe\nnonsense: 1\n"))
	old := "src: s3://b/a.tar.gz\nchecksum: " + strings.Repeat("a", 64) + "\ndest: /srv/a\n"
	write("old/manifest_web_prod.yml", old)
	write("old/nonsense.txt", "x")
	tree := filepath.Dir(write("tree/index.html", "one"))
	dest := filepath.Join(dir, "srv", "app")
	publish := []string{
		"publish", tree, "--to", "file://" + dir + "/releases", "--name", "app", "--version", "1", "--dest", dest,
	}

	for _, c := range []struct {
		kind string
		args []string
		code int
	}{
		{"version", []string{"version"}, exitDone},
		{"status", []string{"status", store}, exitDone},
		{"status", []string{"status", bare}, exitDone},
		{"status", []string{"status", "prod/db", store}, exitDone},
		{"node", []string{"node", "web-2", store}, exitDone},
		{"explain", []string{"explain", "prod/web/app", store}, exitDone},
		{"explain", []string{"explain", "web-2/app", store}, exitDone},
		{"history", []string{"history", "prod/web/app", store}, exitDone},
		{"order", []string{"pin", "prod/web/app", "hold", "--node", "web-2", store}, exitDone},
		{"order", []string{"rollback", "prod/web/app", store}, exitDone},
		{"status", []string{"status", store}, exitDone},
		{"order", []string{"unpin", "prod/web/app", store}, exitDone},
		{"check", []string{"check", repo}, exitDone},
		{"check", []string{"check", bad}, exitFailed},
		{"check", []string{"check", "--manifest", filepath.Join(dir, "old/manifest_web_prod.yml")}, exitDone},
		{"diff", []string{"diff", repo, store}, exitDone},
		{"diff", []string{"diff", repo, bare}, exitDone},
		{"publish", publish, exitDone},
		{"publish", publish, exitDone},
		{"import", []string{"import", "file://" + dir + "/old/", "--repo", repo}, exitDone},
	} {
		out, errs, code := cli(t, "", append(c.args, "--json")...)
		if code != c.code {
			t.Errorf("kedge %s: exit %d\n%s%s", strings.Join(c.args, " "), code, out, errs)
			continue
		}
		validJSON(t, c.kind, out)
	}

	out, _, _ := cli(t, "", publish...)
	if _, errs, code := cli(t, strings.TrimSpace(out)+"\n", "run"); code != exitDone {
		t.Fatalf("run: exit %d\n%s", code, errs)
	}
	if out, errs, code := cli(t, "", "verify", dest, "--json"); code != exitDone {
		t.Errorf("verify: exit %d\n%s", code, errs)
	} else if validJSON(t, "verify", out); strings.TrimSpace(out) != "[]" {
		t.Errorf("a tree as it was published differs in %s", out)
	}
}

// A program that waits is told how it ended, also where it didn't end well.
func TestWaitJSON(t *testing.T) {
	t.Parallel()
	store, _ := operateStore(t)
	for _, c := range []struct {
		args          []string
		code          int
		outcome, says string
	}{
		{[]string{"prod/web/app", store}, exitDone, "converged", ""},
		{[]string{"prod/web/app", "--commit", "0123456789", store}, exitNotConverged, "timeout", "no mirror has taken any"},
		{[]string{"--ready", "127.0.0.1:1"}, exitNotConverged, "timeout", "connection refused"},
	} {
		out, errs, code := cli(t, "", append([]string{"wait", "--timeout", "1s", "--json"}, c.args...)...)
		var o WaitOutcome
		if err := json.Unmarshal([]byte(out), &o); err != nil || code != c.code || o.Outcome != c.outcome ||
			!strings.Contains(o.Message, c.says) || (o.Seconds > 0.9) != (code != exitDone) {
			t.Errorf("kedge wait %q: exit %d, %v: %s%s", c.args, code, err, out, errs)
		}
		validJSON(t, "wait", out)
	}
	hash := strings.Repeat("1", 40)
	for _, c := range []struct {
		pushed        string
		code          int
		outcome, says string
	}{
		{"", exitDone, "nothing-pushed", ""},
		{hash + " " + hash + " refs/heads/feature\n", exitDone, "nothing-pushed", ""},
		{"main\n", exitFailed, "failed", "OLD NEW REF"},
	} {
		out, errs, code := cli(t, c.pushed, "wait", "--post-receive", "--json", store)
		var o WaitOutcome
		if err := json.Unmarshal([]byte(out), &o); err != nil || code != c.code || o.Outcome != c.outcome ||
			o.Commit != "" || !strings.Contains(o.Message, c.says) {
			t.Errorf("%q pushed: exit %d, %v: %s%s", c.pushed, code, err, out, errs)
		}
		validJSON(t, "wait", out)
	}
}
