package deployments

import (
	"cmp"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
)

// UnitID names a unit, which is what a record and a release are for: STAGE/ROLE/UNIT, as in prod/web/app.
type UnitID struct {
	Stage, Role, Unit string
}

// The length is checked outside of the expression: Go compiles a bounded repetition to as many copies.
var segment = regexp.MustCompile(`^[a-z0-9A-Z][a-zA-Z0-9._-]*$`)

// CheckSegment returns an error unless s is a valid segment of a key, a path or a unit's name. The
// argument what names the segment in the error. A segment is 1 to 63 letters, digits, '.', '_' and
// '-', beginning with a letter or a digit. Nothing else may reach a key, as Consul's HTTP API
// cleans paths (t/../k becomes k) but its transactions don't. The names of editors' temporary files
// are refused, as keys may be files that people edit.
func CheckSegment(what, s string) error {
	if len(s) > 63 || !segment.MatchString(s) {
		return fmt.Errorf("%s %q: want 1 to 63 letters, digits, '.', '_' or '-', beginning with a letter or digit",
			what, clip(s))
	}
	switch ext := path.Ext(s); ext {
	case ".swp", ".swx", ".tmp":
		return fmt.Errorf("%s %q: editors name their temporary files so: want one that doesn't end in %s", what, s, ext)
	}
	return nil
}

// ParseUnitID reads STAGE/ROLE/UNIT.
func ParseUnitID(s string) (UnitID, error) {
	parts := strings.Split(s, "/")
	if len(parts) != 3 {
		return UnitID{}, fmt.Errorf("unit %q: want STAGE/ROLE/UNIT, as in prod/web/app", clip(s))
	}
	id := UnitID{parts[0], parts[1], parts[2]}
	return id, id.Check()
}

// Check returns an error if CheckSegment refuses a segment of id.
func (id UnitID) Check() error {
	if err := id.RoleID().Check(); err != nil {
		return err
	}
	return CheckSegment("unit", id.Unit)
}

// RoleID returns the role that the unit belongs to.
func (id UnitID) RoleID() RoleID { return RoleID{id.Stage, id.Role} }

// Compare orders by stage, role and unit.
func (id UnitID) Compare(other UnitID) int {
	return cmp.Or(id.RoleID().Compare(other.RoleID()), strings.Compare(id.Unit, other.Unit))
}

func (id UnitID) String() string { return id.Stage + "/" + id.Role + "/" + id.Unit }

func (id UnitID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

func (id *UnitID) UnmarshalText(text []byte) (err error) {
	*id, err = ParseUnitID(string(text))
	return err
}

// ParseUnitPattern accepts STAGE/ROLE/UNIT, each a name or *.
func ParseUnitPattern(s string) (string, error) {
	parts := strings.Split(s, "/")
	if len(parts) != 3 {
		return "", fmt.Errorf("%q: want STAGE/ROLE/UNIT, each a name or *", clip(s))
	}
	for _, p := range parts {
		if p != "*" {
			if err := CheckSegment("name", p); err != nil {
				return "", err
			}
		}
	}
	return s, nil
}

// MatchesUnit reports whether one of the patterns, as ParseUnitPattern accepts them, names a unit.
func MatchesUnit(patterns []string, id UnitID) bool {
	fits := func(pattern, name string) bool { return pattern == "*" || pattern == name }
	return slices.ContainsFunc(patterns, func(p string) bool {
		parts := strings.Split(p, "/")
		return len(parts) == 3 && fits(parts[0], id.Stage) && fits(parts[1], id.Role) && fits(parts[2], id.Unit)
	})
}

// RoleID names a kind of node: STAGE/ROLE, as in prod/web.
type RoleID struct {
	Stage, Role string
}

// Check returns an error if CheckSegment refuses a segment of id.
func (id RoleID) Check() error {
	if err := CheckSegment("stage", id.Stage); err != nil {
		return err
	}
	return CheckSegment("role", id.Role)
}

// Unit returns the ID of the role's unit with a name.
func (id RoleID) Unit(name string) UnitID { return UnitID{id.Stage, id.Role, name} }

// Compare orders by stage and role.
func (id RoleID) Compare(other RoleID) int {
	return cmp.Or(strings.Compare(id.Stage, other.Stage), strings.Compare(id.Role, other.Role))
}

func (id RoleID) String() string { return id.Stage + "/" + id.Role }

// Unit is one file STAGE/ROLE/UNIT.yaml of a deployments repo.
type Unit struct {
	ID      UnitID
	Release Pointer
	// Place is where Release stands in the commit.
	Place Place
	// After names units of the same role that converge before this one. There are no cycles.
	After []string
	// Rollout bounds how a new release reaches the nodes; nil: every node goes at once.
	Rollout *Rollout
	// Drift says what agents do if the live tree no longer matches the release's index.
	Drift Drift
	// Adopt lets nodes take over a tree at dest that equals the release, byte for byte, without running its
	// commands.
	Adopt bool
}

// Place is a position in a file of a deployments repo. Line and Column count from 1.
type Place struct {
	File         string
	Line, Column int
}

// Rollout bounds how a new target reaches a unit's nodes.
type Rollout struct {
	// Canary is how many nodes go first and bake; zero: none.
	Canary Amount
	// Bake is how long the canary must stay healthy before the rest goes. Without a canary it is how long all
	// nodes must stay healthy before the rollout ends.
	Bake time.Duration
	// MaxUnavailable bounds the nodes in flight; at least one. The zero value means all.
	MaxUnavailable Amount
	// MaxFailures is how many failed nodes a rollout tolerates; one more stops it.
	MaxFailures Amount
	OnFailure   OnFailure
	Approval    Approval
	// Deadline is how long an admitted node may take before it counts as failed; default 10
	// minutes. It counts from the rollout's last step, the start of the node's agent or the end of
	// the store's last outage, whichever is latest. For a node that is gone it counts from its
	// departure.
	Deadline time.Duration
	// FastBack lets a release that was stable lately go without gates. Default true.
	FastBack bool
}

// Amount is a number of nodes, or a percentage of the live ones rounded up.
type Amount struct {
	N       int
	Percent bool
}

// Of returns the amount among n nodes: a percentage is rounded up, so that 10% of 3 is 1.
func (a Amount) Of(n int) int {
	if !a.Percent {
		return a.N
	}
	return (a.N*n + 99) / 100
}

func (a Amount) String() string {
	if a.Percent {
		return fmt.Sprintf("%d%%", a.N)
	}
	return fmt.Sprint(a.N)
}

// OnFailure is what a rollout does when more than MaxFailures nodes have failed. The rollout of a pin always pauses.
type OnFailure string

const (
	Rollback OnFailure = "rollback" // the default
	Pause    OnFailure = "pause"
)

// Approval is who lets a rollout go past its canary.
type Approval string

const (
	Auto   Approval = "auto" // the default
	Manual Approval = "manual"
)

// Drift is what an agent does when the live tree differs from the release's index.
type Drift string

const (
	DriftReport Drift = "report" // the default
	DriftHeal   Drift = "heal"
)
