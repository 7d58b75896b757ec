// Package command runs what a manifest asks for: sh -c in a process group of its own, with a timeout, a user, a bounded
// wait for pipes that a daemon inherited, and bounded output. It treats commands as hostile.
//
// A command inherits the agent's own environment, except what the agent must keep to itself. That is
// Consul's token, password and client key, OpenTelemetry's headers, and variables that configure
// kedge (KEDGE_…). Nor does it inherit what systemd passed to the agent alone, such as sockets and
// credentials. AWS variables stay, because hooks call the aws command. A command that runs as
// another user gets that user's HOME, USER and LOGNAME, but no variables of AWS, Consul, Vault,
// Google, Azure and the like. Exceptions are AWS_REGION, AWS_DEFAULT_REGION and CONSUL_HTTP_ADDR.
// Nor does it get variables whose name says that they are secret, as …_TOKEN, or whose value has a
// URL with a user name, password or token, as a proxy's. Every command gets these variables; one
// that doesn't apply is empty:
//
//	KEDGE_STAGE KEDGE_ROLE KEDGE_UNIT   the unit
//	KEDGE_NODE                          this node's name
//	KEDGE_STEP                          pre, post, success, failure or health
//	KEDGE_RELEASE                       directory of the release that the command belongs to
//	KEDGE_PREVIOUS                      directory of the release before or, on the way back, of the failed or undone one
//	KEDGE_DEST                          the manifest's dest
//	KEDGE_DIGEST                        SHA-256 of the manifest
//	KEDGE_NAME KEDGE_VERSION            the manifest's
//	KEDGE_COMMIT                        the Git commit that asked for the release
//	KEDGE_ERROR                         why the deployment failed or was left; for failure commands, and on the way back
//	KEDGE_RUN                           marks the processes of a step or check: see EndLeftovers; may be unset
//
// The manifest's own variables (commands.env) and its secrets replace the agent's variables, but
// not these.
//
// Processes that a command leaves in the background live on when it exits by itself, whatever its exit status; a
// check's do not. When a command is ended by its timeout or by the agent, all of its process group goes. A daemon
// should still redirect its output: it loses its reader when the agent restarts.
package command

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kedge/deployments"
	"kedge/deployments/safetext"
)

// Env describes one run of a command. All but Vars and Mask become KEDGE_… variables: see the package's comment.
type Env struct {
	Unit     deployments.UnitID
	Node     string
	Step     string // pre, post, success, failure, health
	Release  string // directory of the command's release; empty: it has none
	Previous string // directory of the release before or, on the way back, of the failed or undone one; empty: none
	Dest     string
	Digest   deployments.Digest
	Version  string
	Commit   string
	Name     string
	Error    string // why the deployment failed or was left; empty: it was not
	// Vars are the manifest's own variables (commands.env) and the values of its secrets, by name.
	Vars map[string]string
	// Mask hides values in the log and in errors, but not in Result.Output; nil: it hides nothing.
	Mask *deployments.Mask
	// Run marks the command's processes, for EndLeftovers after a crash; empty: no mark. Check
	// makes a mark of its own.
	Run string
}

// Result is the outcome of a command.
type Result struct {
	// Output is what the command wrote to both streams, at most MaxOutput bytes. A longer output is cut to its
	// beginning and its end, with a line between them that says how much was left out.
	Output []byte
	// Exit is the command's exit status; -1 if a signal ended it or it never ran.
	Exit int
}

const (
	// MaxOutput bounds the output that is kept of one command, in bytes.
	MaxOutput = 64 << 10
	// MaxLines bounds the logged lines of a command's output, and MaxLine the bytes of each line. The notes of what is
	// left out come on top.
	MaxLines = 500
	MaxLine  = 1 << 10
	// LineKey is the log attribute that contains a line of output.
	LineKey = "line"

	defaultTimeout = 10 * time.Minute
	grace          = 5 * time.Second // from SIGTERM to SIGKILL
	pipeWait       = time.Second     // for pipes that outlive the command
)

// ErrTimeout means that the command ran longer than its timeout, and was ended.
var ErrTimeout = errors.New("it was ended, as it ran longer than its timeout")

// Run runs c with stdin; nil: it has none. When ctx ends, or after c.Timeout (0: 10 minutes), c's process group gets
// SIGTERM, and 5 s later SIGKILL. The error is nil if c exits by itself, with status 0. Otherwise it names the command,
// and says how it ended or why it was not run. It wraps ErrTimeout or ctx's cause if that is the reason.
func Run(ctx context.Context, log *slog.Logger, c deployments.Command, env Env, stdin []byte) (Result, error) {
	return runAs(ctx, log, c, env, stdin, false)
}

// Check runs c as Run does, without stdin or a log, and then kills the processes that c left running, even in sessions
// of their own. As a check is tried again and again, such processes would pile up.
func Check(ctx context.Context, c deployments.Command, env Env) error {
	env.Run = "check-" + rand.Text()
	_, err := runAs(ctx, slog.New(slog.DiscardHandler), c, env, nil, true)
	return err
}

// runAs is Run. If killLeft is set, it then kills what c left running, as Check says.
func runAs(
	ctx context.Context,
	log *slog.Logger,
	c deployments.Command,
	env Env,
	stdin []byte,
	killLeft bool,
) (Result, error) {
	timeout := cmp.Or(c.Timeout, defaultTimeout)
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("%w of %s", ErrTimeout, timeout))
	defer cancel()
	cmd := exec.Command("/bin/sh", "-c", c.Run)
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	what := clip(env.Mask.Text(c.Run))
	vars, err := asUser(cmd, c.User)
	if err != nil {
		return Result{Exit: -1}, fmt.Errorf("command %q: %w", what, err)
	}
	cmd.Env = environ(os.Environ(), vars, env)
	if stdin != nil {
		cmd.Stdin = bytes.NewReader(stdin)
	}
	mark := ""
	if killLeft {
		mark = env.Run
	}
	return execute(ctx, log, cmd, what, mark, env.Mask, nil)
}

// Tool runs a system program, such as rsync, as the agent's user and in English. Its output is bounded as by Run, and
// it is ended as by Run when ctx ends, but it has no timeout. all, unless nil, gets all of its output as it comes.
func Tool(ctx context.Context, log *slog.Logger, all io.Writer, name string, args ...string) (Result, error) {
	cmd := exec.Command(name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	cmd.Env = append(environ(os.Environ(), nil, Env{}), "LC_ALL=C") // callers parse its messages
	return execute(ctx, log, cmd, clip(strings.Join(cmd.Args, " ")), "", nil, all)
}

// execute runs cmd, whose SysProcAttr must not be nil, until it exits or ctx ends. what names cmd in the log and in
// errors. If mark is not empty, execute then kills what is left of cmd's group, and processes with the mark in their
// environment. all, unless nil, gets all of cmd's output.
func execute(
	ctx context.Context, log *slog.Logger, cmd *exec.Cmd, what, mark string, mask *deployments.Mask, all io.Writer,
) (Result, error) {
	if ctx.Err() != nil {
		return Result{Exit: -1}, fmt.Errorf("command %q was not run: %w", what, context.Cause(ctx))
	}
	cmd.SysProcAttr.Setpgid = true
	cmd.WaitDelay = pipeWait // a daemon may have inherited stdin without reading it
	pr, pw, err := os.Pipe()
	if err != nil {
		return Result{Exit: -1}, fmt.Errorf("command %q: making its pipe: %w", what, err)
	}
	cmd.Stdout, cmd.Stderr = pw, pw

	begin := time.Now()
	log.Info("running command", "command", what)
	err = cmd.Start()
	pw.Close()
	if err != nil {
		pr.Close()
		return Result{Exit: -1}, fmt.Errorf("command %q: %w", what, err)
	}
	var began uint64
	if mark != "" {
		began = beganAt(cmd.Process.Pid) // before the process can be reaped
	}
	out := &output{log: log, mask: mask}
	if all == nil {
		all = io.Discard
	}
	read := make(chan error, 1)
	go func() { _, err := io.Copy(io.MultiWriter(out, all), pr); read <- err }()
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()

	select {
	case err = <-exited:
	case <-ctx.Done():
		err = context.Cause(ctx)
		log.Warn("ending command", "command", what, "why", err)
		endGroup(cmd.Process.Pid, exited)
	}

	if mark != "" {
		unix.Kill(-cmd.Process.Pid, unix.SIGKILL) // the leader is reaped, but the group's number isn't reused so soon
		killMarked(mark, began, begunSince(cmd.Process.Pid, begin))
	}
	// What the command wrote has been read, or is in the pipe. A process that still holds the other end is a daemon, and
	// keeps a reader.
	pr.SetReadDeadline(time.Now().Add(pipeWait))
	if errors.Is(<-read, os.ErrDeadlineExceeded) {
		log.Info("the command left processes behind that hold its output", "command", what)
		go func() {
			pr.SetReadDeadline(time.Time{})
			io.Copy(io.Discard, pr)
			pr.Close()
		}()
	} else {
		pr.Close()
	}
	out.close()

	result := Result{Output: out.bytes(), Exit: cmd.ProcessState.ExitCode()}
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	if err == nil {
		log.Info("command done", "command", what, "took", time.Since(begin).Round(time.Millisecond))
		return result, nil
	}
	if last := out.lastLine(); last != "" {
		return result, fmt.Errorf("command %q: %w: %s", what, err, last)
	}
	return result, fmt.Errorf("command %q: %w", what, err)
}

// endGroup sends SIGTERM to the process group of leader and, after the grace period, SIGKILL to members that are left.
// It returns when leader is reaped, and the group is empty or was sent SIGKILL. exited receives once leader is reaped.
func endGroup(leader int, exited <-chan error) {
	unix.Kill(-leader, unix.SIGTERM)
	deadline := time.NewTimer(grace)
	defer deadline.Stop()
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	reaped := false
	for {
		select {
		case <-exited:
			reaped, exited = true, nil
		case <-poll.C:
			// While this group has members, no other group can have its number.
			if reaped && errors.Is(unix.Kill(-leader, 0), unix.ESRCH) {
				return
			}
		case <-deadline.C:
			unix.Kill(-leader, unix.SIGKILL)
			if !reaped {
				<-exited
			}
			return
		}
	}
}

// clip returns the first line of a script, with " ..." if there are more lines, cut to 200 bytes. It is for a log line
// or an error.
func clip(s string) string {
	s = strings.TrimSpace(s)
	if line, _, more := strings.Cut(s, "\n"); more {
		s = line + " ..."
	}
	return safetext.Cut(s, 200)
}
