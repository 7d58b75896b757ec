package deployments

import (
	"cmp"
	"fmt"
	"time"

	"kedge/deployments/safetext"
)

// FreezeWindow is a Freeze in mirror/state, with the fields and texts that it has in kedge.yaml.
type FreezeWindow struct {
	Name     string   `json:"name,omitempty"`
	Deny     string   `json:"deny,omitempty"`
	Allow    string   `json:"allow,omitempty"`
	Duration string   `json:"duration"`
	Zone     string   `json:"zone,omitempty"`
	Units    []string `json:"units,omitempty"`
	Running  string   `json:"running,omitempty"`
	Reason   string   `json:"reason,omitempty"`
}

const (
	// maxWindows bounds the number of freeze windows in mirror/state, and maxWindowBytes roughly
	// bounds their bytes, as the value holds other things as well.
	maxWindows     = 100
	maxWindowBytes = 32 << 10
	// maxWindowText bounds a window's name, and its reason, in bytes.
	maxWindowText = 200
)

// FreezeWindows returns the windows of kedge.yaml up to the first that no longer fits into mirror/state, and how many
// it leaves out. A window keeps all of its units; its name and reason are cut.
func FreezeWindows(all []Freeze) (windows []FreezeWindow, more int) {
	size := 0
	for i, f := range all {
		w := FreezeWindow{Name: safetext.Cut(f.Name, maxWindowText), Duration: f.Duration.String(), Units: f.Units,
			Running: f.Running, Reason: safetext.Cut(f.Reason, maxWindowText)}
		if f.Zone != nil && f.Zone != time.UTC {
			w.Zone = f.Zone.String()
		}
		if f.Kind == FreezeAllow {
			w.Allow = f.Cron
		} else {
			w.Deny = f.Cron
		}
		size += 200 + len(w.Name) + len(f.Cron) + len(w.Reason)
		for _, pattern := range w.Units {
			size += len(pattern) + 3
		}
		if i == maxWindows || size > maxWindowBytes {
			return windows, len(all) - i
		}
		windows = append(windows, w)
	}
	return windows, 0
}

// Freeze returns the window as Load reads it from kedge.yaml. It returns an error if this version can't read the
// window, because a newer mirror or somebody else wrote it.
func (w FreezeWindow) Freeze() (Freeze, error) {
	f := Freeze{Name: w.Name, Kind: FreezeDeny, Zone: time.UTC, Units: w.Units, Running: w.Running, Reason: w.Reason}
	if w.Allow != "" {
		f.Kind = FreezeAllow
	}
	var err error
	if f.Cron, err = asCron(cmp.Or(w.Allow, w.Deny)); err != nil {
		return Freeze{}, fmt.Errorf("freeze window: %w", err)
	}
	if f.Duration, err = asPositive(w.Duration); err != nil {
		return Freeze{}, fmt.Errorf("freeze window: duration %w", err)
	}
	if w.Zone != "" {
		if f.Zone, err = asZone(w.Zone); err != nil {
			return Freeze{}, fmt.Errorf("freeze window: %w", err)
		}
	}
	for _, pattern := range w.Units {
		if _, err := ParseUnitPattern(pattern); err != nil {
			return Freeze{}, fmt.Errorf("freeze window: units: %w", err)
		}
	}
	return f, nil
}

// Freezes returns the freeze windows in mirror/state. more is how many windows are missing from all.
// These are the windows that mirror/state leaves out, those beyond maxWindows, and those that this
// version can't read.
func (s MirrorState) Freezes() (all []Freeze, more int) {
	for _, w := range s.Freeze[:min(len(s.Freeze), maxWindows)] {
		if f, err := w.Freeze(); err == nil {
			all = append(all, f)
		}
	}
	return all, max(0, len(s.Freeze)-len(all)+s.FreezeOmitted)
}
