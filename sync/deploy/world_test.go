package deploy

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/deployments"
)

// world is a directory with everything that a unit touches: objects, state, dest, and a file that hooks write to.
type world struct {
	t    testing.TB
	root string
}

func newWorld(t testing.TB) *world {
	w := &world{t, t.TempDir()}
	for _, d := range []string{"objects", "srv"} {
		if err := os.Mkdir(w.path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

func (w *world) path(elem ...string) string {
	return filepath.Join(append([]string{w.root}, elem...)...)
}

func (w *world) dest() string { return w.path("srv", "app") }

// entry is a file of an archive; a mode with fs.ModeDir makes a directory, a link a symbolic link.
type entry struct {
	name, data, link string
	mode             fs.FileMode
}

func (w *world) archive(name string, entries ...entry) (url, checksum string) {
	w.t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{
			Name: e.name, Mode: int64(e.mode.Perm()), Size: int64(len(e.data)), Typeflag: tar.TypeReg,
			ModTime: time.Unix(1700000000, 0),
		}
		if e.mode&fs.ModeSetgid != 0 {
			h.Mode |= 0o2000
		}
		switch {
		case e.mode.IsDir():
			h.Typeflag = tar.TypeDir
		case e.link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
		}
		if err := tw.WriteHeader(h); err != nil {
			w.t.Fatal(err)
		}
		if _, err := tw.Write([]byte(e.data)); err != nil {
			w.t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		w.t.Fatal(err)
	}
	file := w.path("objects", name)
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		w.t.Fatal(err)
	}
	sum := sha256.Sum256(b.Bytes())
	return "file://" + file, hex.EncodeToString(sum[:])
}

// hook is a command that notes what it is, and which release it belongs to.
func (w *world) hook(what string) deployments.Command {
	return deployments.Command{Run: fmt.Sprintf(`echo "%s $KEDGE_VERSION" >> %s`, what, w.path("hooks"))}
}

// hooks is what hooks noted since the last call.
func (w *world) hooks() []string {
	data, err := os.ReadFile(w.path("hooks"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		w.t.Fatal(err)
	}
	if err := os.Remove(w.path("hooks")); err != nil {
		w.t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(data)), "\n")
}

func (w *world) wantHooks(want ...string) {
	w.t.Helper()
	if got := w.hooks(); !slices.Equal(got, want) {
		w.t.Errorf("hooks that ran: %q, want %q", got, want)
	}
}

// publish writes a release of three files that hold its version, with a hook in each place, after change had its
// way with it.
func (w *world) publish(version string, change func(*deployments.Manifest)) deployments.Pointer {
	w.t.Helper()
	src, sum := w.archive(version+".tar",
		entry{name: "a", data: version, mode: 0o644}, entry{name: "dir", mode: fs.ModeDir | 0o755},
		entry{name: "dir/b", data: version, mode: 0o600}, entry{name: "z", data: version, mode: 0o755})
	m := deployments.Manifest{
		Name: "app", Version: version, Src: src, Checksum: sum, Dest: w.dest(), DestMode: 0o755, Strategy: deployments.StrategyRelease, Keep: 1,
		Commands: deployments.Commands{
			Pre: []deployments.Command{w.hook("pre")}, Post: []deployments.Command{w.hook("post")},
			Success: []deployments.Command{w.hook("success")}, Failure: []deployments.Command{w.hook("failure")},
		},
	}
	if change != nil {
		change(&m)
	}
	data, err := m.Encode()
	if err != nil {
		w.t.Fatal(err)
	}
	file := w.path("objects", version+".yaml")
	if err := os.WriteFile(file, data, 0o644); err != nil {
		w.t.Fatal(err)
	}
	return deployments.Pointer{URL: "file://" + file, Digest: sha256.Sum256(data)}
}

var unitID = deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}

func (w *world) config() Config {
	log := slog.New(slog.NewTextHandler(w.t.Output(), nil))
	return Config{ID: unitID, Node: func() string { return "n1" }, Dir: w.path("state"), Objects: object.New(object.Config{Log: log}), Log: log}
}

func (w *world) open(change func(*Config)) *Unit {
	w.t.Helper()
	c := w.config()
	if change != nil {
		change(&c)
	}
	u, err := Open(c)
	if err != nil {
		w.t.Fatal(err)
	}
	return u
}

// reopen is a restart of the agent.
func (w *world) reopen(change func(*Config)) *Unit {
	w.t.Helper()
	u := w.open(change)
	if err := u.Recover(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	return u
}

func (w *world) deploy(u *Unit, p deployments.Pointer) {
	w.t.Helper()
	if err := u.Deploy(w.t.Context(), Request{Release: p, Commit: "c0ffee"}); err != nil {
		w.t.Fatal(err)
	}
}

// version is what dest holds: one version in all files; "" where there is no dest.
func (w *world) version() string {
	w.t.Helper()
	v, err := readVersion(w.dest())
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

func (w *world) wantVersion(want string) {
	w.t.Helper()
	if got := w.version(); got != want {
		w.t.Errorf("dest holds version %q, want %q", got, want)
	}
}

// readVersion resolves dest once and reads all of what it resolved to.
func readVersion(dest string) (string, error) {
	root, err := os.OpenRoot(dest)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer root.Close()
	var version string
	for i, name := range []string{"a", "dir/b", "z"} {
		data, err := root.ReadFile(name)
		if err != nil {
			return "", err
		}
		if i > 0 && string(data) != version {
			return "", fmt.Errorf("%s is of version %q, the file before it of %q", name, data, version)
		}
		version = string(data)
	}
	return version, nil
}

// drains records what Config.Drain was asked.
type drains struct {
	mu  sync.Mutex
	got []bool
	err error
}

func (d *drains) drain(_ context.Context, on bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.got = append(d.got, on)
	return d.err
}

func (d *drains) take() []bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	got := d.got
	d.got = nil
	return got
}

func md5Of(b []byte) string    { s := md5.Sum(b); return hex.EncodeToString(s[:]) }
func sha1Of(b []byte) string   { s := sha1.Sum(b); return hex.EncodeToString(s[:]) }
func sha512Of(b []byte) string { s := sha512.Sum512(b); return hex.EncodeToString(s[:]) }
