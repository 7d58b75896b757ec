package deployments

import "time"

// Settings is kedge.yaml: what holds for the whole deployments repo. The mirror reads it from the commit that it
// mirrors.
type Settings struct {
	// Sources are the URLs, or prefixes of URLs, that releases may come from, by stage ("*": every
	// stage without its own). In a stage without a value, they may come from anywhere. A prefix
	// matches whole path segments: s3://acme-releases/web matches
	// s3://acme-releases/web/1/manifest.yaml, not s3://acme-releases/webx/….
	Sources map[string][]string
	// Dests are the directories in or below which releases may go live. Users are the users that their commands may run as
	// and that may own their trees. Commands says whether they may have commands. All three are by stage, as Sources is; a
	// stage without a value is not bounded. The mirror checks them in the manifest of each release that a commit newly
	// names. Pins are bounded by the agents' configuration.
	Dests    map[string][]string
	Users    map[string][]string
	Commands map[string]bool
	// Prune lets the removal of a unit from Git remove its record. Nodes keep what they run even then.
	Prune bool
	// MaxRemoved is the percentage of units that one commit may remove if Prune is set; one unit is
	// always allowed. Default 30; 100 switches the check off. MaxRemoved and AllowRewind bind the
	// commit after the one that sets them.
	MaxRemoved int
	// AllowRewind accepts a head that doesn't descend from the last one (a force push).
	AllowRewind bool
	Freeze      []Freeze
	// Rollout is the rollout of every unit; nil: kedge.yaml gives none. A unit file may override each of its fields, and
	// Drift.
	Rollout *Rollout
	Drift   Drift
}

// OfStage returns the value of a setting for a stage: the stage's own, or else that of "*". set reports whether there
// is one.
func OfStage[T any](by map[string]T, stage string) (value T, set bool) {
	if value, set = by[stage]; !set {
		value, set = by["*"]
	}
	return value, set
}

// Freeze is a window of time in which rollouts may, or may not, start.
type Freeze struct {
	Name string
	// Kind is deny or allow. Rollouts of a unit that allow windows cover may start only inside such a window. A deny
	// window takes precedence over allow windows.
	Kind FreezeKind
	// Cron is when the window begins: five fields, in Zone. Duration is its length.
	Cron     string
	Zone     *time.Location
	Duration time.Duration
	// Units are patterns STAGE/ROLE/UNIT, each segment a name or *; empty: all.
	Units []string
	// Running is what a rollout under way does when the freeze begins: finish (the default) or wait. A freeze begins when
	// a deny window opens, or the last open allow window closes.
	Running string
	// Reason is shown to those whose rollout the window stops.
	Reason string
}

// FreezeKind is deny or allow.
type FreezeKind string

const (
	FreezeDeny  FreezeKind = "deny"
	FreezeAllow FreezeKind = "allow"
)
