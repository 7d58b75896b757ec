package deploy

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/deployments/durable"
)

const (
	journalFile  = "journal.json"
	manifestsDir = "manifests"
	treesDir     = "trees"
	changesDir   = "made"
	beforeDir    = "before"

	// maxQuarantined bounds journal.Quarantined, which every report contains; the oldest entries are dropped.
	maxQuarantined = 16
)

// journal is a unit's durable state. It is replaced as a whole, so that it is never half written. Only the
// goroutine that calls the unit's methods writes it.
type journal struct {
	Format int `json:"format"` // always 1
	// Running is what was switched to last. Confirmed is set if it passed its health checks.
	Running   deployments.Pointer `json:"running,omitzero"`
	Version   string              `json:"version,omitempty"`
	Confirmed bool                `json:"confirmed,omitempty"`
	// Proven is the ID of the boot in which a release last passed its health checks. If Confirmed is set, that release
	// is Running.
	Proven string `json:"proven,omitempty"`
	// HealthFailure is set as long as the checks of Running fail in normal operation.
	HealthFailure *healthFailure      `json:"unhealthy,omitempty"`
	LastGood      deployments.Pointer `json:"last_good,omitzero"`
	Staged        deployments.Pointer `json:"staged,omitzero"`
	// Newest is this unit's version floor: when the newest signed release that has rolled out here was made. See floorAt
	// and Unit.RaiseFloor. Floors has it as well.
	Newest time.Time     `json:"newest,omitzero"`
	Ahead  *aheadOfClock `json:"ahead,omitempty"`

	Quarantined []Failure `json:"quarantined,omitempty"`
	Drained     bool      `json:"drained,omitempty"`
	// Deployment is the deployment under way; nil: none.
	Deployment *deployment `json:"deployment,omitempty"`
	// Compared is what Adopt's comparison for the newest deployment found; nil: there was none.
	Compared *deployments.Compared `json:"compared,omitempty"`
	// Attempts are the steps that were cut off or began commands with once. The entries of a release are dropped at the
	// end of its deployment, unless that was undone.
	Attempts []attempt `json:"attempts,omitempty"`
	// Before is what was at dest before the first release; nil: nothing was, or it isn't kept for Leave. Restored is the
	// release that was left or failed, while dest holds again what was there before it.
	Before   *before            `json:"before,omitempty"`
	Restored deployments.Digest `json:"restored,omitzero"`
	// StageFailureTold names the last release and key whose failure commands ran because the
	// release could not be staged.
	StageFailureTold string `json:"told,omitempty"`
}

// deployment is a deployment, or a Leave, that is under way.
type deployment struct {
	Release deployments.Pointer `json:"release"`
	// From is the release to which an undone deployment goes back: the one that ran when the
	// deployment began or, if that had failed, the last good one; zero: there is none. Back is the
	// last good release, to which a deployment that fails goes back; zero: there is none but
	// Release.
	From   deployments.Pointer `json:"from,omitzero"`
	Back   deployments.Pointer `json:"back,omitzero"`
	Commit string              `json:"commit,omitempty"`
	Key    string              `json:"key,omitempty"`
	// Step is the current step: all before it are done. It may be half done, or done; doing it again is safe.
	Step step `json:"step"`
	// Run marks the processes of Step's commands.
	Run string `json:"run"`
	// Boot is the ID of the boot in which Step began.
	Boot string `json:"boot,omitempty"`
	// Waits is set while Step isn't under way, but waits for its next try. A restart then doesn't count as a cut-off.
	Waits bool `json:"waits,omitempty"`
	// Touched is set as soon as a switch or a Leave, of this deployment or one that it superseded, may have changed dest.
	Touched bool `json:"touched,omitempty"`
	// Adopted is set if the tree at dest equalled the release, so that only failure commands may run.
	Adopted bool `json:"adopted,omitempty"`
	// Dirty is set if another deployment, which this one superseded, may have changed dest.
	Dirty bool `json:"over,omitempty"`
	// Fault is set once the deployment failed, and goes back.
	Fault *fault `json:"fault,omitempty"`
	// Restored is set once what was at dest before the first release is back there.
	Restored bool `json:"restored,omitempty"`
	// Leaves is set if the deployment goes from the running release to what was at dest before the first one: see
	// Leave. Earlier versions take it for a deployment that was stopped, and stay on the release.
	Leaves bool `json:"leaves,omitempty"`
	// BackFailure is set as long as the release that the deployment went back to, or that Leave leaves, isn't healthy.
	BackFailure *healthFailure `json:"unserved,omitempty"`
}

// save applies a change to the journal: first to the file, and only then in memory. If the file can't be written, the
// unit's state doesn't change.
func (u *Unit) save(change func(*journal)) error {
	next := u.j
	next.Quarantined, next.Attempts = slices.Clone(u.j.Quarantined), slices.Clone(u.j.Attempts)
	if u.j.Deployment != nil {
		d := *u.j.Deployment
		next.Deployment = &d
	}
	change(&next)
	next.Format = 1
	if d, was := next.Deployment, u.j.Deployment; d != nil && (was == nil || d.Run != was.Run) {
		d.Boot = u.boot
	}
	data, err := json.MarshalIndent(next, "", "  ")
	if err != nil {
		return fmt.Errorf("writing the journal of %s: %w", u.name(), err)
	}
	if err := durable.WriteFile(filepath.Join(u.c.Dir, journalFile), data, 0o600); err != nil {
		return fmt.Errorf("writing the journal of %s: %w", u.name(), err)
	}
	u.mu.Lock()
	u.j = next
	u.mu.Unlock()
	return nil
}

// enter makes s the current step, and gives it a new Run mark.
func (d *deployment) enter(s step) {
	d.Step, d.Run, d.Waits = s, rand.Text(), false
	d.Touched = d.Touched || s == stepSwitch || s == stepBack && d.Leaves
}

// load reads the journal, if there is one. A damaged journal is set aside; load then finds the running release by dest.
func (u *Unit) load() error {
	path := filepath.Join(u.c.Dir, journalFile)
	// A write that was killed left these temporary files.
	if aside, err := filepath.Glob(filepath.Join(u.c.Dir, "."+journalFile+"*")); err == nil {
		for _, f := range aside {
			os.Remove(f)
		}
	}
	j, err := durable.ReadState(path, func(j journal) error {
		if j.Deployment != nil && !j.Deployment.Step.known() {
			return fmt.Errorf("unknown step %q of a deployment", j.Deployment.Step)
		}
		return nil
	})
	var damaged *durable.DamagedError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err == nil:
		u.j = j
		return nil
	case !errors.As(err, &damaged):
		return fmt.Errorf("reading the journal of %s: %w", u.name(), err)
	}
	u.log.Error("the journal is damaged: putting it aside and reading what runs from dest",
		"kept", damaged.Kept, "error", damaged.Err)
	running, version := u.runningFromDest()
	return u.save(func(j *journal) { j.Running, j.LastGood, j.Version = running, running, version })
}

// runningFromDest finds the running release without a journal: where the dest of the newest manifest of strategy
// release leads. A later deployment can go back to it. It counts as unconfirmed, so that deploying it again checks it.
// If no dest is a link of kedge's, the running release is unknown: zero.
func (u *Unit) runningFromDest() (running deployments.Pointer, version string) {
	entries, err := os.ReadDir(filepath.Join(u.c.Dir, manifestsDir))
	if err != nil {
		return running, ""
	}
	var newest time.Time
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || info.ModTime().Before(newest) {
			continue
		}
		r, err := artifact.ReadRelease(filepath.Join(u.c.Dir, manifestsDir, e.Name()))
		if err != nil || r.Manifest.Src == "" || r.Manifest.Strategy != deployments.StrategyRelease {
			continue
		}
		live, err := artifact.Open(r.Manifest.Dest, u.c.Objects, u.log).Current()
		if err != nil {
			continue
		}
		newest, running, version = info.ModTime(), live.Pointer, live.Manifest.Version
	}
	return running, version
}

func (u *Unit) manifestFile(d deployments.Digest) string {
	return filepath.Join(u.manifestsDir(), d.String()+".json")
}

// remember stores r's manifest, so that going back to it needs neither network nor environment.
func (u *Unit) remember(r *artifact.Release) error {
	path := u.manifestFile(r.Pointer.Digest)
	if old, err := artifact.ReadRelease(path); err == nil && bytes.Equal(old.Raw, r.Raw) && old.Pointer == r.Pointer {
		return nil
	}
	if err := artifact.WriteRelease(path, r); err != nil {
		return fmt.Errorf("keeping the manifest of %s: %w", r.Pointer.Digest.Short(), err)
	}
	return nil
}

// remembered returns a release that was remembered, or an error if it wasn't; nil for the zero pointer.
func (u *Unit) remembered(p deployments.Pointer) (*artifact.Release, error) {
	if p.IsZero() {
		return nil, nil
	}
	r, err := artifact.ReadRelease(u.manifestFile(p.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the manifest of %s is not kept on this node", p)
	}
	if err == nil {
		u.secrets.add(r.Manifest.Sensitive...)
	}
	return r, err
}
