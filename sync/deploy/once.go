package deploy

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/policy"
	"kedge/sync/command"
)

// OneShot configures Once.
type OneShot struct {
	// URL is a manifest's URL, or a pointer, whose digest is then checked. As with stretcher, the manifest at a bare
	// URL may be replaced by another one at any time.
	URL     string
	Node    string
	Objects *object.Client
	Bounds  policy.Bounds
	// Trust is Config.Trust.
	Trust func(ctx context.Context, p deployments.Pointer, manifest []byte) error
	Fetch FetchLimits
	// Secrets is Config.Secrets.
	Secrets SecretReader
	// RsyncVerbose are the options by which rsync says what it does, as in Config.RsyncVerbose.
	RsyncVerbose []string
	Log          *slog.Logger // nil: discard
}

// FetchLimits bound how long Once tries to fetch a release's archive.
type FetchLimits struct {
	Timeout   time.Duration // for all tries; 0: no bound
	Retry     int           // tries after the first
	RetryWait time.Duration // the pause before each of these
}

// Once converges this machine once on a manifest, whatever was deployed before: it is what kedge run does. It leaves no
// state except the lock file and what the release strategy keeps beside dest. A nil error means that the release is
// live and healthy, and that its success commands ran; failures of these are only logged.
//
// As with stretcher, the failure commands run when staging or the deployment fails, even because of the network. After
// a failure, dest goes back to an earlier release only under strategy release, and if there is one. Once waits for
// another process that deploys to the same dest. If that process has made the same release live, Once does nothing
// more, and returns nil.
func Once(ctx context.Context, o OneShot) (err error) {
	dir, err := os.MkdirTemp("", "kedge-run-")
	if err != nil {
		return fmt.Errorf("making a directory to work in: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	u, err := Open(
		Config{
			Node:         func() string { return o.Node },
			Dir:          dir,
			Objects:      o.Objects,
			Bounds:       o.Bounds,
			Trust:        o.Trust,
			Secrets:      o.Secrets,
			RsyncVerbose: o.RsyncVerbose,
			Log:          o.Log,
		},
	)
	if err != nil {
		return err
	}
	defer func() { err = u.secrets.error(err) }()
	r, err := u.admitAt(ctx, o.URL)
	if err != nil {
		return err
	}
	unlock, err := u.lockDest(ctx, r)
	if err != nil {
		return err
	}
	defer unlock()
	if l := u.lock; l != nil && l.waited && l.last == r.Pointer.Digest.String() && u.switcher(r).IsLive(r) {
		u.log.Info("another deployment has made the release live meanwhile", "release", r.Pointer.String())
		return nil
	}
	if err := u.adopt(r); err != nil {
		return err
	}
	if err = u.stageWithin(ctx, r, o.Fetch); err == nil {
		err = u.deploy(ctx, r, Request{Release: r.Pointer})
	}
	if failed := new(Failed); err == nil || errors.As(err, &failed) {
		return err
	}
	u.log.Error("the deployment failed", "error", err)
	env := u.env(&deployment{Step: stepFailure, Fault: &fault{Reason: short(u.secrets.error(err))}}, r, nil)
	if with, failed := u.withSecrets(context.WithoutCancel(ctx), env, r, duringDeployment); failed == nil {
		env = with
	} else if !errors.Is(err, ErrSecretUnavailable) {
		u.log.Error("failure commands run without their secrets", "error", failed)
	}
	for _, c := range r.Manifest.Commands.Failure {
		if _, failed := command.Run(context.WithoutCancel(ctx), u.log, c, env, u.deployLog.bytes()); failed != nil {
			u.log.Error("a failure command failed: those after it do not run", "error", failed)
			break
		}
	}
	return err
}

// stageWithin stages r, trying as often and as long as limits allow, but not again after deployments.ErrDigest.
func (u *Unit) stageWithin(ctx context.Context, r *artifact.Release, limits FetchLimits) error {
	if limits.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, limits.Timeout, fmt.Errorf("timeout %s reached while fetching src %s",
			limits.Timeout, deployments.ShownURL(r.Manifest.Src)))
		defer cancel()
	}
	for try := 0; ; try++ {
		err := u.stage(ctx, r)
		switch {
		case err != nil && ctx.Err() != nil:
			return errors.Join(context.Cause(ctx), err)
		case err == nil || try >= limits.Retry || errors.Is(err, deployments.ErrDigest):
			return err
		}
		u.log.Warn("the release could not be put on disk: trying again", "try", try+1, "of", limits.Retry,
			"wait", limits.RetryWait, "error", err)
		if wait.For(ctx, limits.RetryWait) != nil {
			return errors.Join(context.Cause(ctx), err)
		}
	}
}

// admitAt admits the manifest at a URL or pointer. A bare URL's digest is that of what was read.
func (u *Unit) admitAt(ctx context.Context, text string) (*artifact.Release, error) {
	p, err := deployments.ParsePointer(text)
	switch {
	case err == nil:
		return u.admit(ctx, p)
	case strings.Contains(text, "@sha256:"): // not a URL, but a pointer that was cut off while it was copied
		return nil, err
	}
	text = deployments.PlainURL(deployments.Trim(text))
	if err := deployments.CheckSourceURL(text); err != nil {
		return nil, fmt.Errorf("manifest %q: %w", deployments.ShownURL(text), err)
	}
	if err := u.c.Bounds.CheckSource(text); err != nil {
		return nil, fmt.Errorf("manifest: %w: %w", ErrRefused, err)
	}
	raw, err := u.c.Objects.ReadAll(ctx, text, deployments.MaxManifest)
	if err != nil {
		return nil, fmt.Errorf("reading the manifest: %w", err)
	}
	return u.admitBytes(ctx, deployments.Pointer{URL: text, Digest: sha256.Sum256(raw)}, raw)
}

// adopt records the release that r's dest leads to as running and last good, so that a failure of r goes back to it. It
// does nothing unless r has a tree and strategy release, or if dest leads to r itself or to nothing of kedge's.
func (u *Unit) adopt(r *artifact.Release) error {
	if r.Manifest.Src == "" || r.Manifest.Strategy != deployments.StrategyRelease {
		return nil
	}
	live, err := artifact.Open(r.Manifest.Dest, u.c.Objects, u.log).Current()
	if err != nil || live.Pointer.Digest == r.Pointer.Digest {
		return nil // nothing that could be gone back to
	}
	if err := u.remember(live); err != nil {
		return err
	}
	return u.save(func(j *journal) {
		j.Running, j.LastGood, j.Version = live.Pointer, live.Pointer, live.Manifest.Version
	})
}

// maxInput bounds what ParseInput reads: Consul keeps 256 events of some 500 bytes.
const maxInput = 4 << 20

// ParseInput finds the manifest's URL in what kedge run reads on stdin. If CONSUL_INDEX is set or the input begins with
// [, the input is Consul's JSON list of events. The URL is then the last event's payload. Otherwise it is the first
// line. An empty URL is an error, but without any event ParseInput returns "", nil: there is nothing to do. It doesn't
// wait for the input's end, because the writer may leave the pipe open.
func ParseInput(in io.Reader, getenv func(string) string) (url string, err error) {
	limited := &io.LimitedReader{R: in, N: maxInput + 1}
	r := bufio.NewReader(limited)
	if mark, _ := r.Peek(1); len(mark) == 1 && mark[0] == 0xef {
		if mark, _ := r.Peek(3); string(mark) == "\ufeff" {
			_, _ = r.Discard(len(mark))
		}
	}
	first, err := r.Peek(1)
	if err != nil && err != io.EOF {
		return "", fmt.Errorf("reading standard input: %w", err)
	}
	if getenv("CONSUL_INDEX") == "" && string(first) != "[" {
		line, err := r.ReadString('\n')
		switch line = strings.TrimSpace(line); {
		case limited.N == 0:
			return "", errLongInput
		case err != nil && err != io.EOF:
			return "", fmt.Errorf("reading standard input: %w", err)
		case line == "":
			return "", errors.New("standard input is empty: want a manifest's URL or Consul events")
		}
		return line, nil
	}
	var events []struct {
		ID      string
		Payload []byte
	}
	switch err := json.NewDecoder(r).Decode(&events); {
	case err == io.EOF:
		return "", nil // consul watch runs its handler once before the first event
	case limited.N == 0:
		return "", errLongInput
	case err != nil:
		return "", fmt.Errorf("standard input is not Consul's JSON list of events: %w", err)
	case len(events) == 0:
		return "", nil
	}
	last := events[len(events)-1]
	if url = strings.TrimSpace(string(last.Payload)); url == "" {
		return "", fmt.Errorf(
			"consul event %q has no payload: want a manifest's URL, as in consul event -name deploy URL",
			last.ID,
		)
	}
	return url, nil
}

var errLongInput = fmt.Errorf("standard input has more than %d bytes: want a manifest's URL or Consul events", maxInput)
