package deploy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/deployments/tooltest"
)

// madeBy is what commands of real releases do to their trees: links in the place of directories, files made from
// templates, files changed, removed and given away.
const madeBy = `set -e; cd "$KEDGE_DEST"
rm -rf dir; ln -sfn ../shared/dir dir
ln -sfn ../shared/uploads uploads
mkdir -p tmp/cache; echo cached > tmp/cache/x
echo secret > conf; chmod 600 conf
echo more >> a
rm -f gone
[ "$(id -u)" != 0 ] || chown 1:2 z team; chmod 700 z; chmod 2770 team
echo 1 > app.pid`

// publishMade is a release whose post command is madeBy.
func (w *world) publishMade(version string, strategy deployments.Strategy) deployments.Pointer {
	w.t.Helper()
	src, sum := w.archive(version+"-made.tar",
		entry{name: "a", data: version, mode: 0o644}, entry{name: "dir", mode: fs.ModeDir | 0o755},
		entry{name: "dir/b", data: version, mode: 0o600}, entry{name: "z", data: version, mode: 0o755},
		entry{name: "gone", data: version, mode: 0o644}, entry{name: "team", mode: fs.ModeDir | fs.ModeSetgid | 0o775},
		entry{name: "ours", mode: fs.ModeDir | fs.ModeSetgid | 0o775})
	return w.publish(version, func(m *deployments.Manifest) {
		m.Src, m.Checksum, m.Strategy = src, sum, strategy
		m.Commands.Post = []deployments.Command{{Run: madeBy}}
	})
}

// made is what madeBy leaves, as far as it can be told.
func (w *world) made() string {
	w.t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(w.dest()+"/", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(w.dest(), p)
		st := info.Sys().(*syscall.Stat_t)
		text, _ := os.Readlink(p)
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			text = string(data)
		}
		fmt.Fprintf(&b, "%s %s %d:%d %q\n", name, info.Mode(), st.Uid, st.Gid, text)
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return b.String()
}

// What a release's own commands made, changed and removed is its own: it is no drift, and healing keeps it, or brings
// it back if it is lost.
func TestMadeByCommands(t *testing.T) {
	t.Parallel()
	for _, strategy := range []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync} {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			u := w.open(nil)
			in := func(p string) string { return filepath.Join(w.dest(), p) }
			must := func(errs ...error) {
				t.Helper()
				for _, err := range errs {
					if err != nil {
						t.Fatal(err)
					}
				}
			}
			drift := func(want ...artifact.Difference) {
				t.Helper()
				ds, err := u.Verify(t.Context(), 0)
				slices.SortFunc(ds, func(a, b artifact.Difference) int { return strings.Compare(a.Path, b.Path) })
				if err != nil || !slices.Equal(ds, want) {
					t.Errorf("drift: %v, %v; want %v", ds, err, want)
				}
			}
			heal := func(left ...artifact.Difference) {
				t.Helper()
				if ds, err := u.Heal(t.Context()); err != nil || !slices.Equal(ds, left) {
					t.Errorf("healing left %v, %v; want %v", ds, err, left)
				}
			}
			w.deploy(u, w.publishMade("1", strategy))
			drift()
			want := w.made()
			u = w.reopen(nil)
			drift()

			// The application goes on in what is its own.
			must(os.WriteFile(in("tmp/cache/y"), []byte("later"), 0o644), os.Remove(in("app.pid")))
			drift()

			// Drift beside it is healed without a loss.
			must(os.WriteFile(in("new"), nil, 0o644))
			drift(artifact.Difference{Path: "new", What: "extra"})
			heal()
			drift()
			if data, err := os.ReadFile(in("tmp/cache/y")); err != nil || string(data) != "later" {
				t.Errorf("healing lost what was written into a directory of the commands': %q, %v", data, err)
			}
			must(os.Remove(in("tmp/cache/y")), os.WriteFile(in("app.pid"), []byte("1\n"), 0o644))
			if got := w.made(); got != want {
				t.Errorf("healed:\n%s\nwant\n%s", got, want)
			}

			// What is lost of it is drift, and comes back.
			must(os.Remove(in("uploads")), os.Remove(in("conf")), os.WriteFile(in("a"), []byte("tampered"), 0o644),
				os.WriteFile(in("gone"), []byte("back"), 0o644), os.Chmod(in("z"), 0o777), os.Remove(in("dir")),
				os.Chmod(in("ours"), 0o775), os.Chmod(in("team"), 0o770))
			drift(artifact.Difference{Path: "a", What: "content"}, artifact.Difference{Path: "conf", What: "missing"},
				artifact.Difference{Path: "dir", What: "missing"}, artifact.Difference{Path: "gone", What: "extra"},
				artifact.Difference{Path: "ours", What: "mode"}, artifact.Difference{Path: "team", What: "mode"},
				artifact.Difference{Path: "uploads", What: "missing"}, artifact.Difference{Path: "z", What: "mode"})
			heal()
			drift()
			if got := w.made(); got != want {
				t.Errorf("healed:\n%s\nwant\n%s", got, want)
			}

			// Only commands can make again what lay in a directory.
			must(os.RemoveAll(in("tmp")), os.WriteFile(in("z"), []byte("tampered"), 0o700))
			lost := artifact.Difference{Path: "tmp", What: "missing"}
			drift(lost, artifact.Difference{Path: "z", What: "content"})
			heal(lost)
			heal(lost)
			drift(lost)

			// All of the tree goes.
			must(os.RemoveAll(w.dest() + "/"))
			if strategy == deployments.StrategyRsync {
				must(os.RemoveAll(w.dest()))
			}
			heal(lost)
			if data, err := os.ReadFile(in("conf")); err != nil || string(data) != "secret\n" {
				t.Errorf("conf: %q, %v", data, err)
			}
			if err := u.Retry(deployments.Digest{}); err != nil {
				t.Fatal(err)
			}
			w.deploy(u, w.publishMade("2", strategy))
			drift()
		})
	}
}

// What commands did to paths with names that rsync prints or matches in its own way, to links, to a file without
// changing its size, and to more paths than fit into a command's kept output, is the release's own, too.
func TestMadeByCommandsWhateverTheNames(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	u := w.open(nil)
	src, sum := w.archive("odd.tar",
		entry{name: "a", data: "1", mode: 0o644}, entry{name: "dir", mode: fs.ModeDir | 0o755},
		entry{name: "dir/b", data: "1", mode: 0o600}, entry{name: "z", data: "1", mode: 0o755},
		entry{name: "link", link: "a"}, entry{name: "link-gone", link: "a"})
	w.deploy(u, w.publish("1", func(m *deployments.Manifest) {
		m.Src, m.Checksum, m.Strategy = src, sum, deployments.StrategyRsync
		m.Commands.Post = []deployments.Command{{Run: `set -e; cd "$KEDGE_DEST"
ln -sfn z link; rm link-gone; echo y > link-made; printf 2 > a
for name in 'caf\303\251' ' space' 'space ' 'tab\t' 'new\nline' 'a -> b' 'back\\slash' '\\#101' '#'; do
	printf made > "$(printf "$name")"
done
mkdir 'w*[1]?\x'; echo made > 'w*[1]?\x/f'
seq -f 'a-file-with-a-name-that-is-not-that-short-%g' 2000 | xargs touch`}}
	}))
	want := w.made()
	if !strings.Contains(want, "café") || !strings.Contains(want, `w*[1]?\x/f`) || strings.Count(want, "\n") < 2000 {
		t.Fatalf("the command made\n%s", want)
	}
	if ds, err := u.Verify(t.Context(), 0); err != nil || len(ds) > 0 {
		t.Errorf("drift: %.20v, %v", ds, err)
	}
	for _, extra := range []string{"new", "line", "wx[1]yx", "z"} {
		if err := os.WriteFile(filepath.Join(w.dest(), extra), []byte("2"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if ds, err := u.Heal(t.Context()); err != nil || len(ds) > 0 {
		t.Errorf("healing left %.20v, %v", ds, err)
	}
	got := strings.Split(w.made(), "\n")
	for line := range strings.SplitSeq(want, "\n") {
		if !slices.Contains(got, line) {
			t.Errorf("healing undid %s", line)
		}
	}
	if want := strings.Count(want, "\n") + 1; len(got) != want {
		t.Errorf("healing left %d paths, want %d", len(got), want)
	}
}

// A tree that differed before its commands ran is no work of theirs.
func TestDriftOfBeforeIsNotTheCommands(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	u := w.open(nil)
	one, two := w.publishMade("1", deployments.StrategyRelease), w.publishMade("2", deployments.StrategyRelease)
	w.deploy(u, one)
	tampered := filepath.Join(w.dest(), "z")
	if err := os.WriteFile(tampered, []byte("tampered"), 0o700); err != nil {
		t.Fatal(err)
	}
	w.deploy(u, two)
	w.deploy(u, one) // its commands run again
	ds, err := u.Verify(t.Context(), 0)
	if err != nil || !slices.Contains(ds, artifact.Difference{Path: "z", What: "content"}) {
		t.Errorf("drift: %v, %v; want that z was changed", ds, err)
	}
}

// What is mounted in a tree, the same device's directories included, is never emptied, carried over or taken for
// drift, in what commands made neither.
func TestMountsInWhatCommandsMade(t *testing.T) {
	t.Parallel()
	tooltest.NeedRoot(t)
	for _, strategy := range []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync} {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			u := w.open(nil)
			w.deploy(u, w.publishMade("1", strategy))
			precious, mounted := w.path("data", "precious"), filepath.Join(w.dest(), "tmp", "cache")
			if err := errors.Join(os.Mkdir(w.path("data"), 0o755), os.WriteFile(precious, []byte("data"), 0o600),
				syscall.Mount(w.path("data"), mounted, "", syscall.MS_BIND, "")); err != nil {
				t.Fatal(err)
			}
			real, err := filepath.EvalSymlinks(mounted)
			if err != nil {
				t.Fatal(err)
			}
			unmount := func() {
				if err := syscall.Unmount(real, syscall.MNT_DETACH); err != nil {
					t.Error(err)
				}
			}
			intact := func(where string) {
				t.Helper()
				if data, err := os.ReadFile(where); err != nil || string(data) != "data" {
					t.Errorf("what is mounted: %q, %v", data, err)
				}
			}
			if ds, err := u.Verify(t.Context(), 0); err != nil || len(ds) > 0 {
				t.Errorf("a mount is no difference: %v, %v", ds, err)
			}
			if err := os.WriteFile(filepath.Join(w.dest(), "new"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			_, err = u.Heal(t.Context())
			if refused := strategy == deployments.StrategyRelease; refused != (err != nil) ||
				refused && !strings.Contains(err.Error(), "mount point") {
				t.Errorf("healing: %v", err)
			}
			intact(precious)
			intact(filepath.Join(mounted, "precious"))
			w.deploy(u, w.publish("2", func(m *deployments.Manifest) { m.Strategy, m.Keep = strategy, 1 }))
			w.deploy(u, w.publish("3", func(m *deployments.Manifest) { m.Strategy, m.Keep = strategy, 1 }))
			intact(precious)
			intact(filepath.Join(real, "precious"))
			unmount()
			if _, err := u.Heal(t.Context()); err != nil {
				t.Error(err)
			}
			intact(precious)
		})
	}
}
