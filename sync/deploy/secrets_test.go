package deploy

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/logtest"
	"kedge/deployments/safetext"
	"kedge/policy"
)

// secretManifest writes a release whose commands have a variable's value in them, with more text.
func (w *world) secretManifest(version, more string) deployments.Pointer {
	w.t.Helper()
	src, sum := w.archive(version+".tar", entry{name: "a", data: version, mode: 0o644})
	text := fmt.Sprintf(
		"version: %q\nsrc: %s\nchecksum: %s\ndest: %s\nsync_strategy: release\n%s",
		version,
		src,
		sum,
		w.dest(),
		more,
	)
	file := w.path("objects", version+".yaml")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
	return deployments.Pointer{URL: "file://" + file, Digest: digestOfFile(w.t, file)}
}

// The value of a variable that commands use reaches the commands, and shows nowhere else: not in the log, the
// journal, the unit's state, an error, what failure commands are told, nor after a restart.
func TestVariablesOfCommandsShowNowhere(t *testing.T) {
	const secret = "hunter2-is'no\"password"
	t.Setenv("KINGDOM_TOKEN", secret)
	w := newWorld(t)
	var log logtest.Buffer
	change := func(c *Config) {
		c.Log = slog.New(slog.NewTextHandler(io.MultiWriter(&log, t.Output()), &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	u := w.open(change)
	hidden := func(where, text string) {
		t.Helper()
		for _, part := range []string{"hunter2", "no\"password", "no\\\"password"} {
			if strings.Contains(text, part) {
				t.Errorf("%s shows the secret:\n%s", where, text)
			}
		}
	}
	everywhere := func(u *Unit, err error) {
		t.Helper()
		hidden("the log", log.String())
		state, jsonErr := json.Marshal(u.State())
		if jsonErr != nil {
			t.Fatal(jsonErr)
		}
		hidden("the state", string(state))
		journal, readErr := os.ReadFile(w.path("state", journalFile))
		if readErr != nil {
			t.Fatal(readErr)
		}
		hidden("the journal", string(journal))
		if err != nil {
			hidden("the error", err.Error())
			if failed := new(Failed); errors.As(err, &failed) {
				hidden("what failed", fmt.Sprint(failed.Err, failed.Facts))
			}
		}
	}
	const value = "\"{{ must_env `KINGDOM_TOKEN` | json_escape }}\""
	hook := func(then string) string { // in YAML's double quotes
		return fmt.Sprintf("\"printf '%%s\\n' \\\"$TOKEN\\\" | tee -a %s; %s\"", w.path("hooks"), then)
	}
	good := w.secretManifest("1", "commands:\n  env: {TOKEN: "+value+"}\n  post: ["+hook("true")+"]\n")
	w.deploy(u, good)
	w.wantHooks(secret)
	everywhere(u, nil)

	stdin := w.path("stdin")
	tell := fmt.Sprintf("'cat > %s; echo $KEDGE_ERROR >> %s'", stdin, stdin)
	for version, more := range map[string]string{
		"pre":    "  pre: [" + hook("exit 1") + "]\n",
		"post":   "  post: [" + hook("printf '%s' \\\"x$TOKEN\\\"; exit 1") + "]\n",
		"health": "health: {timeout: 100ms, checks: [{exec: " + strings.Replace(hook("exit 1"), "$TOKEN", "{{ must_env `KINGDOM_TOKEN` | json_escape | json_escape }}", 1) + "}]}\n",
		"http":   "health: {timeout: 100ms, checks: [{http: \"http://127.0.0.1:1/{{ must_env `KINGDOM_TOKEN` | json_escape }}\"}]}\n",
		"user":   "  pre: [{run: " + value + ", user: nobody-of-that-name}]\n",
		"dest":   "  pre: [" + value + "]\n",
	} {
		p := w.secretManifest(version, "commands:\n  env: {TOKEN: "+value+"}\n  failure: ["+tell+"]\n"+more)
		err := u.Deploy(t.Context(), Request{Release: p})
		if err == nil {
			t.Fatalf("%s: it did not fail", version)
		}
		everywhere(u, err)
		told, err := os.ReadFile(stdin)
		if err != nil {
			t.Fatal(err)
		}
		hidden("what failure commands are told", string(told))
		if err := os.Remove(stdin); err != nil {
			t.Fatal(err)
		}
		w.hooks()
	}

	// After a restart the manifest is read from disk, and the environment may be another.
	os.Unsetenv("KINGDOM_TOKEN")
	u = w.reopen(change)
	m, err := u.Monitor()
	if err != nil || m != nil {
		t.Fatal(m, err)
	}
	last := w.secretManifest("last", "commands:\n  post: ['false']\n")
	err = u.Deploy(t.Context(), Request{Release: last}) // goes back: the post commands of the good one run again
	if err == nil {
		t.Fatal("it did not fail")
	}
	w.wantHooks(secret)
	everywhere(u, err)
}

// kedge run keeps to the same.
func TestVariablesOfARunShowNowhere(t *testing.T) {
	const secret = "hunter2-is-no-password"
	t.Setenv("KINGDOM_TOKEN", secret)
	w := newWorld(t)
	var log logtest.Buffer
	logger := slog.New(slog.NewJSONHandler(io.MultiWriter(&log, t.Output()), nil))
	stdin := w.path("stdin")
	p := w.secretManifest(
		"1",
		"commands:\n  pre: [\"echo {{ env `KINGDOM_TOKEN` }}; exit 1\"]\n"+
			"  failure: ['cat > "+stdin+"; echo $KEDGE_ERROR >> "+stdin+"']\n",
	)
	for url, manifest := range map[string]string{
		p.URL:               "",
		p.URL + "-invalid":  "keep: {{ must_env `KINGDOM_TOKEN` }}\n",
		p.URL + "-fetch":    "src: file:///{{ must_env `KINGDOM_TOKEN` }}\nchecksum: " + strings.Repeat("a", 64) + "\ndest: " + w.dest() + "\ncommands: {failure: [cat]}\n",
		p.URL + "-checksum": "src: " + p.URL + "\nchecksum: " + strings.Repeat("a", 64) + "\ndest: " + w.dest() + "\ncommands: {failure: [\"cat {{ must_env `KINGDOM_TOKEN` }}\"]}\n",
	} {
		if manifest != "" {
			if err := os.WriteFile(strings.TrimPrefix(url, "file://"), []byte(manifest), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		c := w.config()
		err := Once(t.Context(), OneShot{URL: url, Node: "n1", Objects: c.Objects, Log: logger})
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", url, err)
		}
	}
	told, err := os.ReadFile(stdin)
	if err != nil {
		t.Fatal(err)
	}
	if all := log.String() + string(told); strings.Contains(all, "hunter2") || !strings.Contains(all, "***") {
		t.Errorf("the log shows the secret, or no mask:\n%s", all)
	}
}

// What nobody signed, or comes from elsewhere, is not looked into: its variables are not read, and nothing is fetched.
func TestUnsignedManifestIsNotExpanded(t *testing.T) {
	t.Setenv("KINGDOM_TOKEN", "hunter2")
	w := newWorld(t)
	p := w.secretManifest("1", "keep: {{ must_env `KINGDOM_TOKEN` }}\n")
	untrusted := func(context.Context, deployments.Pointer, []byte) error { return policy.ErrUntrusted }
	run := func(c Config, url string) error {
		return Once(t.Context(), OneShot{URL: url, Objects: c.Objects, Bounds: c.Bounds, Trust: c.Trust, Log: c.Log})
	}
	c := w.config()
	c.Trust = untrusted
	u, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{"deploy": u.Deploy(t.Context(), Request{Release: p}), "stage": u.Stage(t.Context(), p), "run": run(c, p.URL)} {
		if !errors.Is(err, policy.ErrUntrusted) || strings.Contains(err.Error(), "keep") ||
			strings.Contains(err.Error(), " 4:") {
			t.Errorf("%s: %v", what, err)
		}
	}
	c = w.config()
	c.Bounds.Sources = []string{"s3://acme"}
	if u, err = Open(c); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(w.root, "objects", "1.yaml")); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{"deploy": u.Deploy(t.Context(), Request{Release: p}), "run": run(c, p.URL)} {
		if !errors.Is(err, ErrRefused) {
			t.Errorf("%s from elsewhere: %v", what, err)
		}
	}
	if requests, _ := c.Objects.Requests(); requests != 0 {
		t.Errorf("%d requests for what may not be fetched", requests)
	}
}

func digestOfFile(t testing.TB, file string) (d deployments.Digest) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(data)
}

// What is secret in URLs shows in no line of a fetch's log, at any level, and in no error.
func TestSignedURLsShowNowhere(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	src, sum := w.archive("1.tar", entry{name: "a", data: "1", mode: 0o644})
	var broken atomic.Bool
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Query().Get("X-Amz-Signature") != "s3cret":
			rw.WriteHeader(http.StatusForbidden)
		case strings.HasSuffix(r.URL.Path, ".sig"):
			rw.WriteHeader(http.StatusNotFound)
		case strings.HasPrefix(r.URL.Path, "/away"):
			http.Redirect(rw, r, "http://u:s3cret@away.invalid/?X-Amz-Signature=s3cret", http.StatusFound)
		case broken.Load():
			rw.WriteHeader(http.StatusServiceUnavailable)
		default:
			http.ServeFile(rw, r, w.path("objects", filepath.Base(r.URL.Path)))
		}
	}))
	defer server.Close()
	const query = "?X-Amz-Credential=x&X-Amz-Signature=s3cret"
	var log logtest.Buffer
	c := w.config()
	c.Log = slog.New(
		safetext.NewHandler(
			slog.NewJSONHandler(io.MultiWriter(&log, t.Output()), &slog.HandlerOptions{Level: slog.LevelDebug}),
		),
	)
	c.Objects = object.New(object.Config{Log: c.Log})
	u, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	for name, src := range map[string]string{"good": server.URL + "/1.tar" + query, "gone": server.URL + "/gone.tar" + query, "away": server.URL + "/away.tar" + query,
		"denied": server.URL + "/1.tar?X-Amz-Signature=s3cret-but-wrong", "closed": "http://127.0.0.1:1/x" + query, "here": src} {
		text := fmt.Sprintf("src: %q\nchecksum: %s\ndest: %s\nsync_strategy: release\n", src, sum, w.dest())
		file := w.path("objects", name+".yaml")
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		p := deployments.Pointer{URL: server.URL + "/" + name + ".yaml" + query, Digest: digestOfFile(t, file)}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		err := u.Deploy(ctx, Request{Release: p})
		cancel()
		if (err == nil) != (name == "good" || name == "here") || err != nil && strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Nor does what a command prints, in its error.
	text := fmt.Sprintf("dest: %s\ncommands: {pre: [\"echo get 'https://u:s3cret@h/x%s' >&2; exit 7\"]}\n",
		w.dest(), query)
	file := w.path("objects", "shows.yaml")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	shows := deployments.Pointer{URL: server.URL + "/shows.yaml" + query, Digest: digestOfFile(t, file)}
	if err := u.Deploy(t.Context(), Request{Release: shows}); err == nil || strings.Contains(err.Error(), "s3cret") ||
		!strings.Contains(err.Error(), "X-Amz-Signature=…") {
		t.Errorf("a command that shows a URL: %v", err)
	}
	broken.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	err = u.Stage(ctx, deployments.Pointer{URL: server.URL + "/other.yaml" + query, Digest: deployments.Digest{1}})
	if err == nil || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("broken: %v", err)
	}
	if text := log.String(); strings.Contains(text, "s3cret") || !strings.Contains(text, "trying again") {
		t.Errorf("the log shows a signature, or not what is tried:\n%s", text)
	}
}
