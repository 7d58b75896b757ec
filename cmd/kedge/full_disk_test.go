package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/artifact"
	"kedge/deployments"
)

// Pushes of releases that fail, one after the other, leave a node the room to stage the one that mends it.
func TestFixAfterManyReleasesThatFail(t *testing.T) {
	t.Parallel()
	const node = "web-1"
	w := newWorld(t, node)
	disk := filepath.Join(w.dir, node)
	if err := os.MkdirAll(disk, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=12m"); err != nil {
		t.Fatalf("a disk for %s, for which this test needs root: %v", node, err)
	}
	t.Cleanup(func() { // before the processes end, which is why it ends the agent
		if p := w.processes[node]; p != nil {
			p.kill()
		}
		if err := unix.Unmount(disk, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount the disk of %s: %v", node, err)
		}
	})
	w.startMirror("mirror-1")
	w.startAgent(node)

	random := rand.NewChaCha8([32]byte{})
	release := func(version, post string) deployments.Pointer {
		return w.publish("app", version, func(o *artifact.PublishOptions) {
			ballast := make([]byte, 2<<20) // which doesn't compress
			random.Read(ballast)
			if err := os.WriteFile(filepath.Join(o.Dir, "ballast"), ballast, 0o600); err != nil {
				t.Fatal(err)
			}
			o.Manifest.Keep = 2
			o.Manifest.Commands.Post = []deployments.Command{{Run: post}}
		})
	}
	push := func(p deployments.Pointer) {
		file := fmt.Sprintf("release: %s\n", p)
		w.push("deploy "+p.URL, map[string]*string{webApp.String(): &file})
	}
	good := release("good", "true")
	push(good)
	w.live("app", "good", node)
	for i := range 6 {
		bad := release(fmt.Sprint("bad-", i), "false")
		push(bad)
		w.reported(node, "app", func(u deployments.UnitReport) string {
			if u.Running != good || !slices.Contains(u.Quarantined, bad.Digest) || u.State != deployments.StateQuarantined {
				return "it has yet to fail, and to go back"
			}
			return ""
		})
	}
	w.live("app", "good", node)
	push(release("fix", "true"))
	w.live("app", "fix", node)
}
