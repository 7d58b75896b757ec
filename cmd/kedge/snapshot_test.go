package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/kv"
)

// writeFile gives a path in dir with a text in it.
func writeFile(t testing.TB, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSnapshot(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	objects := object.New(object.Config{})
	key, line := signingKey(t, dir, "mirror")
	stolen, _ := signingKey(t, dir, "thief")
	signers := writeFile(t, dir, "signers", line)
	url := "file://" + filepath.Join(dir, "desired.json")
	records := []kv.Entry{{Key: kv.DesiredKey(webApp), Value: []byte("file:///x@sha256:00")}, {Key: kv.PinKey(webApp), Value: []byte("a pin")}}
	write := func(url, key string) error {
		t.Helper()
		save, err := snapshotWriter(url, key, objects)
		if err != nil {
			t.Fatal(err)
		}
		return save(t.Context(), records)
	}
	read := func(maxAge time.Duration) ([]kv.Entry, error) {
		t.Helper()
		load, err := snapshotReader(url, signers, maxAge, objects, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return load(t.Context())
	}

	for range 2 { // the second replaces the first
		if err := write(url, key); err != nil {
			t.Fatal(err)
		}
	}
	got, err := read(time.Hour)
	if err != nil || len(got) != 1 || got[0].Key != records[0].Key || string(got[0].Value) != string(records[0].Value) {
		t.Errorf("read %v, %v; want the record, and no pin", got, err)
	}
	path := strings.TrimPrefix(url, "file://")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		spoil  func() error
		maxAge time.Duration
		says   string
	}{
		"signed by another": {func() error { return write(url, stolen) }, time.Hour, "not among the allowed signers"},
		"another text": {func() error {
			return os.WriteFile(path, []byte(strings.Replace(string(good), "sha256:00", "sha256:11", 1)), 0o600)
		}, time.Hour, "of another content"},
		"no signature":        {func() error { return os.WriteFile(path, []byte(`{"format":1,"snapshot":"{}","signature":""}`), 0o600) }, time.Hour, "not an SSH signature"},
		"not of this kind":    {func() error { return os.WriteFile(path, []byte(`[]`), 0o600) }, time.Hour, "snapshot: "},
		"of another format":   {func() error { return os.WriteFile(path, []byte(`{"format":2}`), 0o600) }, time.Hour, "format 2"},
		"made for another":    {func() error { other := url + "2"; return errors.Join(write(other, key), os.Rename(path+"2", path)) }, time.Hour, "was made for"},
		"older than is taken": {func() error { return nil }, time.Nanosecond, "snapshot_max_age"},
		"not there":           {func() error { return os.Remove(path) }, time.Hour, "no such object"},
	} {
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := c.spoil(); err != nil {
			t.Fatal(err)
		}
		if got, err := read(c.maxAge); err == nil || len(got) > 0 || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: read %v, %v; want an error that says %q", name, got, err, c.says)
		}
	}

	if _, err := snapshotReader(url, "", time.Hour, objects, nil); err == nil {
		t.Error("a snapshot is taken without signers")
	}
	if _, err := snapshotWriter(url, "", objects); err == nil {
		t.Error("a snapshot is written without a key")
	}
}

// A node that boots for the first time while Consul is away runs what the mirror's snapshot says; of one that a
// thief of the S3 key put in its place it takes nothing.
func TestFirstBootWithoutConsul(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "web-1", "web-2")
	key, line := signingKey(t, w.dir, "mirror")
	stolen, _ := signingKey(t, w.dir, "thief")
	signers := writeFile(t, w.dir, "snapshot_signers", line)
	url := w.s3.URL("state/desired.json")
	token := w.token("mirror", deployments.RuleVars{Node: w.consul.Servers[0].Name})
	w.start("mirror", slices.Concat(w.consul.Env(token), w.s3.Env(), []string{"SSL_CERT_FILE=" + w.git.caFile}),
		"mirror", w.git.url, "--every", "300ms", "--lease-ttl", "10s", "--name", "mirror", "--snapshot", url, "--snapshot-key", key)
	one := w.publish("app", "1")
	w.release("app 1", one)
	load, err := snapshotReader(url, signers, time.Hour, w.objects, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	w.eventually("the snapshot holds the record", func() error {
		entries, err := load(t.Context())
		if err == nil && !slices.ContainsFunc(entries, func(e kv.Entry) bool { return strings.Contains(string(e.Value), one.String()) }) {
			err = fmt.Errorf("it holds %v", entries)
		}
		return err
	})

	boot := func(node string) *process {
		if err := os.MkdirAll(w.srv(node), 0o755); err != nil {
			t.Fatal(err)
		}
		return w.start(node, slices.Concat(w.s3.Env(), []string{"CONSUL_HTTP_ADDR=127.0.0.1:1", "SRV=" + w.srv(node)}), "agent", "--node", node, "--stage", "prod",
			"--roles", "web", "--state-dir", filepath.Join(w.dir, node, "state"), "--snapshot", url, "--snapshot-signers", signers)
	}
	first := boot("web-1")
	w.eventually("web-1 runs what the snapshot says", func() error {
		v, err := readTree(filepath.Join(w.srv("web-1"), "app"))
		if err == nil && v != "1" {
			err = fmt.Errorf("it runs %q", v)
		}
		return err
	})
	if log := first.logged(); !strings.Contains(log, "using the mirror's snapshot") {
		t.Errorf("the log does not say where the release came from:\n%s", log)
	}

	if err := w.processes["mirror"].stop(); err != nil {
		t.Error(err)
	}
	forge, err := snapshotWriter(url, stolen, w.objects)
	if err != nil {
		t.Fatal(err)
	}
	if err := forge(context.WithoutCancel(t.Context()), []kv.Entry{{Key: kv.DesiredKey(webApp), Value: []byte(w.publish("app", "evil").String())}}); err != nil {
		t.Fatal(err)
	}
	second := boot("web-2")
	w.eventually("web-2 names what is wrong with the snapshot", func() error {
		if log := second.logged(); !strings.Contains(log, "not among the allowed signers") {
			return errors.New("its log does not")
		}
		return nil
	})
	if _, err := os.Lstat(filepath.Join(w.srv("web-2"), "app")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("web-2 deployed something: %v", err)
	}
}
