package deploy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/artifact/object"
	"kedge/deployments"
)

const fullEnv = "KEDGE_TEST_FULL"

// TestFullDisk has dest on a tmpfs of 256 KiB, in a mount namespace of a child's own: one release fits, the next
// doesn't, and that is no fault of the release.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	for _, strategy := range []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync, deployments.StrategyMv} {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			set := func(m *deployments.Manifest) {
				m.Strategy = strategy
				if strategy == deployments.StrategyMv {
					m.Commands.Pre = []deployments.Command{{Run: "rm -rf " + w.dest()}}
				}
			}
			pointers := []string{w.publish("1", set).String(), w.publish("2", func(m *deployments.Manifest) {
				set(m)
				m.Src, m.Checksum = w.archive("large.tar", entry{name: "a", data: strings.Repeat("2", 1<<20), mode: 0o644})
			}).String(), w.publish("3", set).String()}
			cmd := exec.Command(os.Args[0], "-test.run=^$")
			cmd.Env = append(os.Environ(), fullEnv+"="+w.root+" "+strings.Join(pointers, " "))
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
			if os.Geteuid() != 0 {
				cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
				cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
				cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
			}
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// fullChild is the child of TestFullDisk: ROOT and three pointers, the second of which doesn't fit.
func fullChild(args []string) error {
	root := args[0]
	var ps []deployments.Pointer
	for _, text := range args[1:] {
		p, err := deployments.ParsePointer(text)
		if err != nil {
			return err
		}
		ps = append(ps, p)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", filepath.Join(root, "srv"), "tmpfs", 0, "size=256k"); err != nil {
		return fmt.Errorf("mounting a tmpfs: %w", err)
	}
	u, err := Open(Config{ID: unitID, Node: func() string { return "n1" }, Dir: filepath.Join(root, "state"), Objects: object.New(object.Config{})})
	if err != nil {
		return err
	}
	dest := filepath.Join(root, "srv", "app")
	want := func(version string) error {
		if got, err := readVersion(dest); err != nil || got != version {
			return fmt.Errorf("dest holds %q, %w; want %q", got, err, version)
		}
		if s := u.State(); s.Unfinished || s.Drained || len(s.Quarantined) > 0 {
			return fmt.Errorf("state: %+v", s)
		}
		return nil
	}
	if err := u.Deploy(context.Background(), Request{Release: ps[0]}); err != nil {
		return err
	}
	err = u.Deploy(context.Background(), Request{Release: ps[1]})
	var failed *Failed
	if err == nil || errors.As(err, &failed) || !strings.Contains(strings.ToLower(err.Error()), "space") {
		return fmt.Errorf("the disk is full: %w", err)
	}
	if err := want("1"); err != nil {
		return err
	}
	if err := u.Deploy(context.Background(), Request{Release: ps[2]}); err != nil {
		return fmt.Errorf("when there is space again: %w", err)
	}
	return want("3")
}
