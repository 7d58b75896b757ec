package deploy

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strings"
	"time"
)

// BootID identifies this boot of the machine; empty if the kernel doesn't say. In a container the kernel's boot ID is
// the host's. nspawn puts another boot ID in its place, but a service with mounts of its own doesn't see that one. So
// BootID includes the start time of process 1.
func BootID() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	boot := strings.TrimSpace(string(id))
	stat, _ := os.ReadFile("/proc/1/stat") // if it can't be read, the kernel's boot ID has to do
	// After the name, which may contain anything, the start time is the 20th field: clock ticks since the kernel's
	// boot. See proc(5).
	if fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:])); len(fields) >= 20 {
		boot += "/" + fields[19]
	}
	return boot
}

// shuttingDown reports whether systemd is shutting this machine down. systemd then ends services and refuses new ones
// before it ends the agent. A command or check that fails meanwhile is no fault of the release.
func shuttingDown() bool {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return false // systemd isn't this machine's init
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	// The error is ignored: the command exits with another status than 0 in all states but running.
	state, _ := exec.CommandContext(ctx, "systemctl", "is-system-running").Output()
	return strings.TrimSpace(string(state)) == "stopping"
}

// Prove waits for the checks of the running release, if they haven't passed in this boot. Once they pass, it marks the
// release as proven, and as healthy. It does nothing if no confirmed release runs, or if a deployment is under way.
func (u *Unit) Prove(ctx context.Context) error {
	r, err := u.liveRelease()
	if err != nil || r == nil || !u.j.Confirmed || u.j.Proven == u.boot {
		return err
	}
	d := &deployment{Release: r.Pointer}
	d.enter(stepHealth)
	if err := u.healthy(ctx, d, r, nil); err != nil {
		return err
	}
	return u.save(func(j *journal) { j.Proven, j.HealthFailure = u.boot, nil })
}
