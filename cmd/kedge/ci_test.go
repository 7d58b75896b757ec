package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"kedge/deployments"
)

// The script of the CI templates publishes, changes the line, and waits: for a release that the fleet runs, for the
// same one again, and for one that fails there.
func TestReleaseFromCI(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "web-1")
	w.startMirror("mirror")
	w.startAgent("web-1")
	first := "# the application\nrelease: " + w.publish("app", "1").String() + " # renovate\nrollout: {max_unavailable: 1}\n"
	w.push("release 1", map[string]*string{"prod/web/app": &first})
	w.live("app", "1", "web-1")

	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "kedge"), []byte("#!/bin/sh\nexec "+w.self()+" \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	run := func(version, post string) (outputs, text string, code int) {
		t.Helper()
		dir := t.TempDir()
		writeTree(t, filepath.Join(dir, "dist"), version)
		manifest := "name: app\ndest: '{{ must_env `SRV` }}/app'\ncommands: {post: ['" + post + "']}\n"
		if err := os.WriteFile(filepath.Join(dir, "kedge.yaml"), []byte(manifest), 0o644); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("sh", "../../deployments/ci/release.sh")
		cmd.Env = append(os.Environ(), w.consul.Env(w.token("operator", deployments.RuleVars{}))...)
		cmd.Env = append(cmd.Env, w.s3.Env()...)
		cmd.Env = append(cmd.Env, "PATH="+bin+":"+os.Getenv("PATH"), "DIR="+filepath.Join(dir, "dist"), "VERSION="+version,
			"UNITS=prod/web/app", "MANIFEST="+filepath.Join(dir, "kedge.yaml"), "DEPLOYMENTS="+w.git.bare, "WAIT=60s",
			"KEDGE_PUBLISH_TO="+w.s3.URL("releases"), "GITHUB_OUTPUT="+filepath.Join(dir, "out"), "GITHUB_STEP_SUMMARY="+filepath.Join(dir, "summary"))
		out, err := cmd.CombinedOutput()
		if err != nil && cmd.ProcessState == nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(filepath.Join(dir, "out"))
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(data), string(out), cmd.ProcessState.ExitCode()
	}

	outputs, text, code := run("2", "true")
	if code != 0 || !strings.Contains(outputs, "result=converged\n") || !strings.Contains(outputs, "pointer=") {
		t.Fatalf("exit code %d, outputs\n%s\n%s", code, outputs, text)
	}
	w.live("app", "2", "web-1")
	w.gitDo(w.work, "pull", "-q", "origin", "main")
	file, err := os.ReadFile(filepath.Join(w.work, "prod/web/app.yaml"))
	if err != nil || !strings.HasPrefix(string(file), "# the application\nrelease: ") || !strings.HasSuffix(string(file), " # renovate\nrollout: {max_unavailable: 1}\n") {
		t.Errorf("the unit's file is %q, %v", file, err)
	}
	if _, text, code = run("2", "true"); code != 0 || !strings.Contains(text, "names this release already") {
		t.Errorf("run again: exit code %d\n%s", code, text)
	}
	if outputs, text, code = run("3", "exit 7"); code != 1 || !strings.Contains(outputs, "result=failed\n") {
		t.Errorf("a release that fails: exit code %d, outputs\n%s\n%s", code, outputs, text)
	}
	w.live("app", "2", "web-1")
}

// Both templates are YAML, and set each variable that the script needs.
func TestCITemplates(t *testing.T) {
	t.Parallel()
	for _, file := range []string{"github/action.yml", "gitlab/release.yml"} {
		data, err := os.ReadFile("../../deployments/ci/" + file)
		if err != nil {
			t.Fatal(err)
		}
		var v map[string]any
		if err := yaml.Unmarshal(data, &v); err != nil {
			t.Errorf("%s: %v", file, err)
		}
		for _, name := range []string{"DIR", "UNITS", "VERSION", "DEPLOYMENTS", "WAIT", "KEDGE_PUBLISH_TO"} {
			if !strings.Contains(string(data), name+":") {
				t.Errorf("%s doesn't set %s", file, name)
			}
		}
	}
}
