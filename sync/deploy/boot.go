package deploy

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strings"
	"time"
)

// BootID names this boot of the machine; empty where the kernel doesn't say. In a container the kernel's boot is
// the host's, also where nspawn covers it with another, which a service with mounts of its own does not see: so the
// first process's start counts, too.
func BootID() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	boot := strings.TrimSpace(string(id))
	stat, _ := os.ReadFile("/proc/1/stat") // where it can't be read, the kernel's boot has to do
	// Behind the name, which may hold anything, the start is the 20th field: clock ticks since the kernel's boot. See
	// proc(5).
	if fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:])); len(fields) >= 20 {
		boot += "/" + fields[19]
	}
	return boot
}

// shuttingDown reports whether systemd stops this machine. It ends services and takes no starts then, before the
// agent itself is told to end: what a command or a check makes of that is no fault of a release.
func shuttingDown() bool {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return false // it isn't systemd that runs here
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	state, _ := exec.CommandContext(ctx, "systemctl", "is-system-running").Output() // exits non-zero unless all is well
	return strings.TrimSpace(string(state)) == "stopping"
}

// Prove waits until the checks of what runs pass, where this boot hasn't seen that yet; it changes nothing but
// State.Proven. It does nothing where nothing runs, or a deployment is under way.
func (u *Unit) Prove(ctx context.Context) error {
	r, err := u.settled()
	if err != nil || r == nil || !u.j.Confirmed || u.j.Proven == u.boot {
		return err
	}
	d := &deployment{Release: r.Pointer}
	d.enter(stepHealth)
	if err := u.healthy(ctx, d, r, nil); err != nil {
		return err
	}
	return u.save(func(j *journal) { j.Proven = u.boot })
}
