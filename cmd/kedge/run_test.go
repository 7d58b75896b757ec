package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// oldRelease is a manifest and an archive as people made them for stretcher, as files.
type oldRelease struct {
	dir, manifest, archive, dest string
	sum                          string
}

// newOldRelease makes a release with one file of random bytes; %s of the manifest's more is the directory.
func newOldRelease(t *testing.T, size int, more string) oldRelease {
	t.Helper()
	dir := t.TempDir()
	r := oldRelease{dir: dir, manifest: filepath.Join(dir, "manifest.yml"), archive: filepath.Join(dir, "app.tar"), dest: filepath.Join(dir, "app")}
	content := make([]byte, size)
	for i := range content {
		content[i] = byte(rand.Uint32())
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "file", Mode: 0o644, Size: int64(size), Typeflag: tar.TypeReg}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b.Bytes())
	r.sum = hex.EncodeToString(sum[:])
	if err := os.WriteFile(r.archive, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	r.write(t, "file://"+r.archive, more)
	return r
}

func (r oldRelease) write(t *testing.T, src, more string) {
	t.Helper()
	text := fmt.Sprintf("src: %s\nchecksum: %s\ndest: %s\n%s", src, r.sum, r.dest, strings.ReplaceAll(more, "DIR", r.dir))
	if err := os.WriteFile(r.manifest, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (r oldRelease) url() string { return "file://" + r.manifest }

func (r oldRelease) deployed() bool {
	_, err := os.Stat(filepath.Join(r.dest, "file"))
	return err == nil
}

// asStretcher makes kedge's process, called by a link of stretcher's name.
func asStretcher(t *testing.T, env []string, args ...string) *exec.Cmd {
	t.Helper()
	link := filepath.Join(t.TempDir(), "stretcher")
	if err := os.Symlink(testedProgram(t), link); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(link, args...)
	cmd.Env = append(baseEnv(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

func TestProgramArgs(t *testing.T) {
	t.Parallel()
	for called, want := range map[string]string{
		"/usr/bin/kedge status -v": "status -v",
		"stretcher":                "run",
		"/usr/local/bin/stretcher --max-band-width=1MB":                        "run --max-band-width=1MB",
		"/usr/local/bin/stretcher -timeout 300 -retry=3 -rsync-verbose -vv -v": "run --timeout 300 --retry=3 --rsync-verbose -vv -v",
	} {
		words := strings.Fields(called)
		if got := strings.Join(translateArgs(words[0], words[1:]), " "); got != want {
			t.Errorf("%s: %s, want %s", called, got, want)
		}
	}
}

// By stretcher's name, with the flags of its old and new versions, it deploys what one line of standard input says,
// though the pipe stays open.
func TestRunAsStretcher(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string][]string{
		"none": nil,
		"old":  {"-timeout", "300", "-retry", "3", "-retry-wait", "3", "-random-delay", "0.01", "-max-bandwidth", "100MB", "-rsync-verbose", "-vv"},
		"new":  {"--timeout=5m", "--retry=3", "--retry-wait=3s", "--random-delay=10ms", "--max-band-width=100 MiB", "--rsync-verbose=-v"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newOldRelease(t, 10, "")
			cmd := asStretcher(t, nil, flags...)
			var log bytes.Buffer
			pipe, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			cmd.Stdout, cmd.Stderr = &log, &log
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(pipe, r.url()+"\n"); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err != nil || !r.deployed() {
				t.Errorf("%v\n%s", err, log.String())
			}
			if said := strings.Contains(log.String(), "sending incremental file list"); !said {
				t.Errorf("rsync's own words are not in the log:\n%s", log.String())
			}
		})
	}
	out, err := asStretcher(t, nil, "-v").Output()
	if err != nil || !strings.Contains(string(out), "for stretcher") {
		t.Errorf("-v: %s, %v", out, err)
	}
}

// consul watch ends when its handler fails: a deployment that fails below it exits 0, and is logged as an error.
func TestRunBelowConsulWatch(t *testing.T) {
	t.Parallel()
	r := newOldRelease(t, 10, "commands:\n  post: [exit 3]\n  failure: [echo failed > DIR/told]\n")
	event := fmt.Sprintf(`[{"ID":"1","Name":"deploy","Payload":%q}]`, "ZmlsZTovLy9ub3doZXJl")
	for _, c := range []struct {
		name, stdin string
		env         []string
		fails       bool
	}{
		{name: "by hand", stdin: r.url() + "\n", fails: true},
		{name: "no such manifest, watched", stdin: event, env: []string{"CONSUL_INDEX=7"}},
		{name: "not JSON, watched", stdin: r.url(), env: []string{"CONSUL_INDEX=7"}},
		{name: "no such manifest", stdin: event, fails: true},
	} {
		cmd := asStretcher(t, c.env)
		cmd.Stdin = strings.NewReader(c.stdin)
		out, err := cmd.CombinedOutput()
		if (err != nil) != c.fails {
			t.Errorf("%s: %v, want a failure: %v\n%s", c.name, err, c.fails, out)
		}
		if !c.fails && !strings.Contains(string(out), "level=ERROR") {
			t.Errorf("%s: it isn't logged:\n%s", c.name, out)
		}
	}
	if _, err := os.Stat(filepath.Join(r.dir, "told")); err != nil {
		t.Error("its failure commands did not run")
	}
}

// SIGTERM ends it while it waits for its input, or for its turn.
func TestRunEndsBySIGTERM(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{"input": {"--log-level", "debug"}, "delay": {"--random-delay", "100h"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cmd := asStretcher(t, nil, args...)
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			defer stdin.Close()
			stderr, err := cmd.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if _, err := stderr.Read(make([]byte, 1)); err != nil { // it says what it waits for
				t.Fatal(err)
			}
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			rest, _ := io.ReadAll(stderr)
			if err := cmd.Wait(); cmd.ProcessState.ExitCode() != exitFailed {
				t.Errorf("%v, want exit code %d\n%s", err, exitFailed, rest)
			}
		})
	}
}

func TestRunBoundsBandwidth(t *testing.T) {
	t.Parallel()
	r := newOldRelease(t, 600_000, "")
	begun := time.Now()
	_, stderr, code := cli(t, "", "run", "--max-band-width", "400kb", r.url())
	// The first 256 KiB come at once.
	if took := time.Since(begun); code != 0 || took < 700*time.Millisecond {
		t.Errorf("600 kB at 400 kB/s took %s, exit code %d\n%s", took, code, stderr)
	}
}

// An archive comes by plain http from another machine only if the sources name that: nobody else may lead there.
func TestRunByPlainHTTP(t *testing.T) {
	t.Parallel()
	r := newOldRelease(t, 10, "")
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		asked.Add(1)
		http.ServeFile(w, q, r.archive)
	}))
	t.Cleanup(server.Close)
	_, port, err := net.SplitHostPort(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	host := "http://0.0.0.0:" + port // leads here, and counts as another machine's address
	r.write(t, host+"/releases/app.tar", "")
	for _, sources := range []string{"", "file://,https://0.0.0.0:" + port + "/", "file:///,http://0.0.0.0/"} {
		args := []string{"run", r.url()}
		if sources != "" {
			args = append(args, "--sources", sources)
		}
		_, stderr, code := cli(t, "", args...)
		if code != 1 || !strings.Contains(stderr, "sources") || asked.Load() != 0 || r.deployed() {
			t.Errorf("sources %q: exit code %d, %d requests\n%s", sources, code, asked.Load(), stderr)
		}
	}
	if _, stderr, code := cli(t, "", "run", "--sources", "file:///,"+host+"/releases/", r.url()); code != 0 ||
		!r.deployed() {
		t.Errorf("named: exit code %d\n%s", code, stderr)
	}
}

func TestRunRetriesAndGivesUp(t *testing.T) {
	t.Parallel()
	r := newOldRelease(t, 10, "")
	var refuse, asked atomic.Int32
	hang := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		switch {
		case q.URL.Path == "/hang":
			select {
			case <-hang:
			case <-q.Context().Done():
			}
		case asked.Add(1) <= refuse.Load():
			http.NotFound(w, q)
		default:
			http.ServeFile(w, q, r.archive)
		}
	}))
	t.Cleanup(server.Close)
	t.Cleanup(func() { close(hang) })

	for _, c := range []struct {
		src    string
		refuse int32
		flags  []string
		code   int
		says   string
	}{
		{src: "/app.tar", refuse: 2, flags: []string{"--retry", "2", "--retry-wait", "10ms"}},
		{src: "/app.tar", refuse: 2, flags: []string{"--retry", "1", "--retry-wait", "10ms"}, code: exitFailed, says: "no such object"},
		{src: "/app.tar", refuse: 1, code: exitFailed, says: "no such object"},
		{src: "/hang", flags: []string{"--timeout", "0.2"}, code: exitFailed, says: "timeout 200ms reached while fetching src"},
		{src: "/app.tar", refuse: 9, flags: []string{"--timeout", "0.2", "--retry", "9", "--retry-wait", "1h"}, code: exitFailed, says: "timeout 200ms"},
		{src: "/app.tar", flags: []string{"--retry-wait", "soon"}, code: exitUsage, says: "want a duration"},
		{src: "/app.tar", flags: []string{"--rsync-verbose", "-q"}, code: exitUsage, says: "want -v"},
	} {
		r.write(t, server.URL+c.src, "")
		if err := os.RemoveAll(r.dest); err != nil {
			t.Fatal(err)
		}
		asked.Store(0)
		refuse.Store(c.refuse)
		_, stderr, code := cli(t, "", append([]string{"run", r.url()}, c.flags...)...)
		if code != c.code || !strings.Contains(strings.Join(strings.Fields(stderr), " "), c.says) || r.deployed() != (c.code == 0) {
			t.Errorf("%s %q: exit code %d, want %d and %q\n%s", c.src, c.flags, code, c.code, c.says, stderr)
		}
	}
}

func TestByteRate(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{
		"": 0, "0": 0, "1000": 1000, "20M": 20e6, "20MB/s": 20e6, "20 MiB": 20 << 20, "1.5mb": 1.5e6, "10ki": 10 << 10, "20,000": 20000, "1GB": 1e9,
		"x": -1, "-1": -1, "1XB": -1, "MB": -1, "1e30": -1,
		"1": 1, "0.0005k": -1, "0.5": -1, "0.9kb": 900, "nan": -1, "inf": -1, "NaNMB/s": -1,
	} {
		got, err := byteRate(text)
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("%q: %d, want %d (%v)", text, got, want, err)
		}
	}
}
