package safefs

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/artifact/treetest"
)

// stranger is a user of these tests without an entry in any database.
const stranger = 4321

func TestPlaces(t *testing.T) {
	t.Parallel()
	home := treetest.OpenHome(t)
	treetest.Mkdir(t, home+"/data/sub", 0)
	treetest.Mkdir(t, home+"/out", 0)
	treetest.Mkdir(t, home+"/apps/theirs/sub", stranger)
	treetest.Mkdir(t, home+"/apps/theirs", stranger)
	treetest.Mkdir(t, home+"/open", 0)
	treetest.Mkdir(t, home+"/open/ours", 0)
	treetest.Mkdir(t, home+"/open/theirs", stranger)
	treetest.Mkdir(t, home+"/group/ours", 0)
	treetest.Mkdir(t, home+"/group/theirs", stranger)
	if err := errors.Join(os.Chmod(home+"/open", os.ModeSticky|0o777), os.Chown(home+"/group", 0, stranger),
		os.Chmod(home+"/group", os.ModeSticky|0o775)); err != nil {
		t.Fatal(err)
	}
	treetest.Relink(t, home+"/srv", "data")
	treetest.Relink(t, home+"/apps/ours", "../data")
	treetest.Relink(t, home+"/apps/away", home+"/out")
	treetest.Relink(t, home+"/open/link", home+"/out")
	treetest.Relink(t, home+"/apps/theirs/rootlink", home+"/out") // as one of a release's tree that they moved
	treetest.Relink(t, home+"/apps/theirs/link", home+"/out")
	treetest.Relink(t, home+"/theirlink", "data")
	if err := errors.Join(os.Lchown(home+"/apps/theirs/link", stranger, stranger),
		os.Lchown(home+"/theirlink", stranger, stranger)); err != nil {
		t.Fatal(err)
	}
	treetest.Relink(t, home+"/loop", "loop")
	them := fmt.Sprint(stranger)
	for _, c := range []struct {
		dest   string
		within []string
		owner  string
		real   string // of dest's directory; empty: it is refused
		fixed  bool
	}{
		{dest: "/data/app", real: "/data", fixed: true},
		{dest: "/srv/app", real: "/data", fixed: true},
		{dest: "/apps/ours/sub/app", real: "/data/sub", fixed: true},
		{dest: "/apps/theirs/app", real: "/apps/theirs", fixed: true}, // what lies there is what they can change
		{dest: "/apps/theirs/sub/app", real: "/apps/theirs/sub"},
		{dest: "/apps/theirs/link/app"},
		{dest: "/apps/theirs/rootlink/app"},
		{dest: "/theirlink/app"},
		{dest: "/open/link/app"},
		{dest: "/open/ours/app", real: "/open/ours", fixed: true},
		{dest: "/open/theirs/app", real: "/open/theirs"}, // its owner can put a link in its place
		{dest: "/group/ours/app", real: "/group/ours", fixed: true},
		{dest: "/group/theirs/app", real: "/group/theirs"},
		{dest: "/loop/app"},
		{dest: "/data/app", within: []string{"/srv"}, real: "/data", fixed: true},
		{dest: "/srv/app", within: []string{"/srv"}, real: "/data", fixed: true},
		{dest: "/srv/sub/app", within: []string{"/srv"}, real: "/data/sub", fixed: true},
		{dest: "/srv/app", within: []string{"/srv/app"}, real: "/data", fixed: true},
		{dest: "/apps/away/app", within: []string{"/apps"}},
		{dest: "/apps/away/app", within: []string{"/apps", "/out"}, real: "/out", fixed: true},
		{dest: "/apps/theirs/app", within: []string{"/apps"}},
		{dest: "/apps/theirs/app", within: []string{"/apps"}, owner: "1"},
		{dest: "/apps/theirs/app", within: []string{"/apps"}, owner: them, real: "/apps/theirs", fixed: true},
		// named by who set the bounds
		{dest: "/apps/theirs/app", within: []string{"/apps/theirs"}, real: "/apps/theirs", fixed: true},
	} {
		for i := range c.within {
			c.within[i] = home + c.within[i]
		}
		p, err := OpenPlace(home+c.dest, PlaceOptions{Within: c.within, Owner: c.owner})
		if c.real == "" {
			if err == nil {
				p.Close()
			}
			if err == nil || !errors.Is(err, ErrUnsafe) && !errors.Is(err, unix.ELOOP) {
				t.Errorf("%s within %v: got %v", c.dest, c.within, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s within %v: %v", c.dest, c.within, err)
			continue
		}
		if p.real != home+c.real || p.fixed != c.fixed {
			t.Errorf("%s within %v leads to %s, fixed %v", c.dest, c.within, p.real, p.fixed)
		}
		p.Close()
	}
}

// A private directory that others own already, or may write into, isn't used as it is.
func TestPrivateDirectoriesOfOthers(t *testing.T) {
	t.Parallel()
	home := treetest.OpenHome(t)
	treetest.Mkdir(t, home+"/apps/.kedge", stranger)
	treetest.Mkdir(t, home+"/data/.kedge", 0)
	if err := os.Chmod(home+"/data/.kedge", 0o777); err != nil {
		t.Fatal(err)
	}
	for dest, safe := range map[string]bool{"/apps/app": false, "/data/app": true} {
		p, err := OpenPlace(home+dest, PlaceOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		below, err := p.OpenPrivate(".kedge", true)
		if !safe {
			if !errors.Is(err, ErrUnsafe) {
				t.Errorf("%s: %v", dest, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		defer below.Close()
		if st, err := below.stat(); err != nil || st.Mode&0o022 != 0 {
			t.Errorf("%s: mode %o, %v", dest, st.Mode, err)
		}
	}
}
