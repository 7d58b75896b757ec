package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/artifact"
	"kedge/deployments"
)

// hook installs a script of the repo that is pushed to, which calls kedge as an operator would.
func (w *world) hook(name, args string) {
	w.t.Helper()
	script := "#!/bin/sh\n"
	for _, v := range w.consul.Env(w.token("operator", deployments.RuleVars{})) {
		script += "export '" + v + "'\n"
	}
	if err := os.WriteFile(filepath.Join(w.git.bare, "hooks", name), fmt.Appendf(nil, "%sexec %s %s\n", script, w.self(), args), 0o755); err != nil {
		w.t.Fatal(err)
	}
}

// Who pushes sees the mistakes of a push that is refused, and the rollout of one that isn't, until its end.
func TestPushShowsWhatComesOfIt(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "web-1")
	w.hook("pre-receive", "check --pre-receive")
	w.hook("post-receive", "wait --post-receive --timeout 2m")
	w.startMirror("mirror")
	w.startAgent("web-1")
	one := w.publish("app", "1")

	push := func(content string) (string, error) {
		t.Helper()
		path := filepath.Join(w.work, webApp.String()+".yaml")
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		w.gitDo(w.work, "add", "-A")
		w.gitDo(w.work, "commit", "-q", "-m", "app")
		return w.git1(w.work, "push", "-q", "origin", "main")
	}
	out, err := push("release: " + one.String() + "\n")
	if err != nil || !strings.Contains(out, "remote:") || !strings.Contains(out, "all nodes run what was pushed") {
		t.Errorf("%v; the push says:\n%s", err, out)
	}
	w.live("app", "1", "web-1")
	t.Logf("the push said:\n%s", out)

	bad := w.publish("app", "2", func(o *artifact.PublishOptions) {
		o.Manifest.Commands.Post = []deployments.Command{{Run: "exit 1", Timeout: time.Minute}}
	})
	if out, err = push("release: " + bad.String() + "\n"); err != nil || !strings.Contains(out, "failed there") {
		t.Errorf("%v; the push of a release that fails says:\n%s", err, out)
	}
	t.Logf("the push of a release that fails said:\n%s", out)

	if out, err = push("release: typo\n"); err == nil || !strings.Contains(out, "prod/web/app.yaml:1:") {
		t.Errorf("%v; the push of a typo says:\n%s", err, out)
	}
}
