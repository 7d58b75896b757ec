package deployments

import "time"

// Settings is kedge.yaml: what holds for the whole deployments repo. The mirror reads it from the commit that it
// mirrors.
type Settings struct {
	// Sources are URLs that releases may come from, or prefixes of such, by stage ("*": every stage); empty: any. A
	// prefix matches whole path segments: s3://acme-releases/web matches s3://acme-releases/web/1/manifest.yaml, not
	// s3://acme-releases/webx/….
	Sources map[string][]string
	// Dests are directories in or below which releases may go live, Users those that their commands may run as and
	// that may own their trees, and Commands whether they may have any: by stage, as Sources; a stage without a value
	// is not bounded. They are the mirror's to check: it reads the manifest of each release that a commit names anew.
	// Pins are bounded by the agents' configuration.
	Dests    map[string][]string
	Users    map[string][]string
	Commands map[string]bool
	// Prune lets a unit's removal from Git remove its record. Nodes never undeploy for it.
	Prune bool
	// MaxRemoved is the share of units, in percent, that one commit may remove. Default 30; 100 switches the check off.
	MaxRemoved int
	// AllowRewind accepts a head that isn't a descendant of the last one (a force push).
	AllowRewind bool
	Freeze      []Freeze
	// Defaults apply to every unit file that does not say otherwise.
	Rollout *Rollout
	Drift   Drift
}

// OfStage returns a setting's value for a stage: its own, or else that of "*".
func OfStage[T any](by map[string]T, stage string) (value T, set bool) {
	if value, set = by[stage]; !set {
		value, set = by["*"]
	}
	return value, set
}

// Freeze is a window of time in which rollouts may, or may not, start.
type Freeze struct {
	Name string
	// Kind is deny or allow. A unit under any allow window may start only inside one; deny wins.
	Kind FreezeKind
	// Cron is the window's start, five fields, in Zone; Duration its length.
	Cron     string
	Zone     *time.Location
	Duration time.Duration
	// Units are patterns STAGE/ROLE/UNIT, each segment a name or *; empty: all.
	Units []string
	// Running is what a rollout under way does when the window begins: finish (the default) or wait.
	Running string
	// Reason is shown to whom it stops.
	Reason string
}

// FreezeKind is deny or allow.
type FreezeKind string

const (
	FreezeDeny  FreezeKind = "deny"
	FreezeAllow FreezeKind = "allow"
)
