package deploy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kedge/artifact"
	"kedge/artifact/safefs"
	"kedge/deployments"
	"kedge/deployments/wait"
)

// destLock lets one process at a time deploy to a dest: agents with any state directory, and kedge run. It locks
// the file .NAME.kedge-lock beside dest. The file is never removed, as two processes could then hold the lock. Its
// first line is the digest of the release deployed there last; an optional second line is agentLine's.
type destLock struct {
	dest  string
	place *safefs.Place // the directory of dest and of the lock file
	file  *os.File      // nil: nothing can be written beside dest, and there is no lock
	// waited is set if another process held the lock at first. last is the digest of the release that was deployed to dest
	// last; empty: none was, or the newest deployment didn't succeed.
	waited bool
	last   string
	// agent is the agentLine of the agent that deployed there last; empty: none did.
	agent string
}

// agentMark begins the line of a lock file that names an agent: its unit, and its socket, by which others see
// whether it lives.
const agentMark = "agent "

func (u *Unit) agentLine() string {
	if u.c.Socket == "" {
		return ""
	}
	return agentMark + u.c.ID.String() + " " + u.c.Socket
}

// read parses a lock file's content.
func (l *destLock) read(text string) {
	last, rest, _ := strings.Cut(text, "\n")
	l.last, l.agent = strings.TrimSpace(last), ""
	if line, _, _ := strings.Cut(rest, "\n"); strings.HasPrefix(line, agentMark) {
		l.agent = line
	}
}

// livingAgent returns the unit of the agent that deployed to dest last, if that agent lives.
func (l *destLock) livingAgent(ctx context.Context) (unit string, lives bool) {
	unit, socket, _ := strings.Cut(strings.TrimPrefix(l.agent, agentMark), " ")
	if socket == "" {
		return "", false
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return "", false
	}
	c.Close()
	return unit, true
}

// LockFile returns the path of dest's lock file, which each deployment to dest writes.
func LockFile(dest string) string { return filepath.Join(filepath.Dir(dest), lockName(dest)) }

// lastDeployed returns the release that any kedge process deployed to dest last; zero: a deployment is under way or
// didn't succeed, or it is unknown.
func lastDeployed(dest string) deployments.Digest {
	f, err := os.OpenFile(LockFile(dest), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return deployments.Digest{}
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 1<<10))
	if err != nil {
		return deployments.Digest{}
	}
	var l destLock
	l.read(string(text))
	d, _ := deployments.ParseDigest(l.last)
	return d
}

func lockName(dest string) string { return "." + filepath.Base(dest) + ".kedge-lock" }

// open opens the lock file. It refuses a symbolic link and a file with a second name, because the directory's owner
// could make either lead to a file elsewhere. It also refuses other kinds of files.
func (l *destLock) open(flags int) (*os.File, error) {
	f, err := os.OpenFile(l.place.Path(lockName(l.dest)), flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(int(f.Fd()), &st); err == nil && (st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink > 1) {
		err = fmt.Errorf("%s is no lock file of kedge, but a link or another kind of file: remove it", LockFile(l.dest))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (l *destLock) close() {
	if l.file != nil {
		// A child process that is just being started may still have the file.
		_ = unix.Flock(int(l.file.Fd()), unix.LOCK_UN)
		l.file.Close()
	}
	if l.place != nil {
		l.place.Close()
	}
}

// lockDest waits for the lock of r's dest, and holds it until unlock is called. If the release has no tree, or if this
// unit holds a lock already, lockDest and unlock do nothing. If nothing can be written beside dest, lockDest goes on
// without the lock file.
func (u *Unit) lockDest(ctx context.Context, r *artifact.Release) (unlock func(), err error) {
	dest := r.Manifest.Dest
	if r.Manifest.Src == "" || u.lock != nil {
		return func() {}, nil
	}
	l := &destLock{dest: dest}
	unwritable := func(err error) bool {
		return errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS)
	}
	l.place, err = safefs.OpenPlace(dest, safefs.PlaceOptions{
		Within: u.c.Bounds.Dests, Owner: r.Manifest.Owner,
		Create: r.Manifest.Strategy == deployments.StrategyRelease, // this strategy creates the directory anyway
	})
	if err == nil {
		l.file, err = l.open(os.O_RDONLY | os.O_CREATE)
	}
	switch {
	case err != nil && !unwritable(err):
		l.close()
		return nil, fmt.Errorf("locking dest %s: %w", dest, err)
	case err == nil:
		if err := u.await(ctx, l); err != nil {
			l.close()
			return nil, fmt.Errorf("taking the lock of dest %s: %w", dest, err)
		}
		if own := u.agentLine(); own != "" {
			l.agent = own
		} else if unit, lives := l.livingAgent(ctx); lives {
			u.log.Warn("an agent manages dest: it will report this deployment as another tool's, and undo it if the unit has "+
				"drift: heal",
				"dest", dest, "unit", unit, "hint", "kedge pin "+unit+" POINTER has the agent deploy it")
		}
	}
	u.lock = l
	return func() {
		u.lock = nil
		l.close()
	}, nil
}

// await takes the lock, and waits while another process holds it, until ctx ends. It then reads the lock file.
func (u *Unit) await(ctx context.Context, l *destLock) error {
	retry := wait.NewBackoff(20*time.Millisecond, time.Second)
	for {
		err := unix.Flock(int(l.file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil:
			text, err := io.ReadAll(io.LimitReader(l.file, 1<<10))
			l.read(string(text))
			return err
		case !errors.Is(err, unix.EWOULDBLOCK):
			return err
		}
		if !l.waited {
			u.log.Warn("another process is deploying to dest: waiting until it has ended", "dest", l.dest)
			l.waited = true
		}
		if err := retry.Wait(ctx); err != nil {
			return err
		}
	}
}

// noteBegun records in the lock file that dest is between releases; noteDone records which release
// it holds.
func (l *destLock) noteBegun() { l.note("") }

func (l *destLock) noteDone(p deployments.Pointer) { l.note(p.Digest.String()) }

// note writes the lock file's content. It ignores errors, because the lock holds whatever the file contains.
func (l *destLock) note(last string) {
	if l == nil || l.file == nil {
		return
	}
	// l.file is open only for reading, so that the file system can be remounted read-only while the lock is held.
	f, err := l.open(os.O_WRONLY)
	if err != nil {
		return
	}
	_ = f.Truncate(0)
	_, _ = f.WriteString(last + "\n" + l.agent + "\n")
	_ = f.Close()
}
