package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"kedge/deployments"
)

// agentConfig is /etc/kedge/agent.yaml. Each field is also a flag (dashes for underscores) and an environment variable
// (KEDGE_ and capitals); the flag wins over the environment, the environment over the file.
type agentConfig struct {
	Stage    string `yaml:"stage"`
	Roles    words  `yaml:"roles"`
	Node     string `yaml:"node"`
	StateDir string `yaml:"state_dir"`
	Listen   string `yaml:"listen"`

	Sources words `yaml:"sources"`
	// LocalSources lets releases come from file:// and, on this machine, http:// also where Sources doesn't name them.
	LocalSources bool `yaml:"local_sources"`

	Dests      words  `yaml:"dests"`
	Users      words  `yaml:"users"`
	NoCommands bool   `yaml:"no_commands"`
	Signers    string `yaml:"signers"`
	// AllowOlderPins has effect with Signers only.
	AllowOlderPins bool `yaml:"allow_older_pins"`
	// AllowEmpty lets a node be ready whose stage and roles have no unit.
	AllowEmpty bool `yaml:"allow_empty"`

	// Maintenance has the node's maintenance mode in Consul on while a unit is drained; it takes node:write.
	Maintenance bool `yaml:"maintenance"`

	// Snapshot is the object that the mirror keeps, for a first boot while the store is away.
	Snapshot        string        `yaml:"snapshot"`
	SnapshotSigners string        `yaml:"snapshot_signers"`
	SnapshotMaxAge  time.Duration `yaml:"snapshot_max_age"`

	// EC2 takes stage and roles, where nothing else gives them, from the instance's tags.
	EC2              bool          `yaml:"ec2"`
	LifecycleHook    string        `yaml:"lifecycle_hook"`
	LifecycleTimeout time.Duration `yaml:"lifecycle_timeout"`
	AutoScalingGroup string        `yaml:"autoscaling_group"`

	MaxBandwidth string        `yaml:"max_bandwidth"`
	StartDelay   time.Duration `yaml:"start_delay"`
	VerifyEvery  time.Duration `yaml:"verify_every"`
	ReadyTimeout time.Duration `yaml:"ready_timeout"`
}

// agentDefaults is what holds where nothing else is said. A zero says something: verify_every: 0s is never.
func agentDefaults() agentConfig {
	return agentConfig{
		SnapshotMaxAge: 72 * time.Hour, LifecycleTimeout: 15 * time.Minute, VerifyEvery: 24 * time.Hour, ReadyTimeout: 15 * time.Minute,
	}
}

// durationOf reads a duration; what it says of a wrong one is all that is said of it, without its place.
func durationOf(d *time.Duration, text []byte) (err error) {
	s := strings.Trim(strings.TrimSpace(string(text)), `"'`)
	if *d, err = time.ParseDuration(s); err != nil || *d < 0 {
		return fmt.Errorf("%q: want a duration, as in 30s or 5m", s)
	}
	return nil
}

// words is a list, or as flags and the environment have it: one text with commas.
type words []string

func (w *words) UnmarshalYAML(read func(any) error) error {
	var one string
	if read(&one) == nil {
		*w = list(one)
		return nil
	}
	return read((*[]string)(w))
}

const defaultAgentConfig = "/etc/kedge/agent.yaml"

// readAgentConfig reads file, strictly. A missing default file is an empty one; a missing named one is an error.
func readAgentConfig(file string) (agentConfig, error) {
	c := agentDefaults()
	name := file
	if name == "" {
		name = defaultAgentConfig
	}
	data, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) && file == "" {
		return c, nil
	}
	if err != nil {
		return c, fmt.Errorf("reading the agent's configuration: %w", err)
	}
	if err := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict(), yaml.CustomUnmarshaler(durationOf)).Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return c, configError(name, err)
	}
	return c, nil
}

// configError says where in a file a mistake is, as everywhere in kedge: FILE:LINE:COLUMN.
func configError(file string, err error) error {
	var at yaml.Error
	if !errors.As(err, &at) || at.GetToken() == nil || at.GetToken().Position == nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	token, says := at.GetToken(), at.GetMessage()
	if wrong := new(yaml.TypeError); errors.As(err, &wrong) && wrong.DstType.Kind() == reflect.Bool {
		says = fmt.Sprintf("%q: want true or false", token.Value)
	}
	if errors.As(err, new(*yaml.UnknownFieldError)) {
		fields := func(yield func(string) bool) {
			for _, f := range reflect.VisibleFields(reflect.TypeFor[agentConfig]()) {
				if !yield(f.Tag.Get("yaml")) {
					return
				}
			}
		}
		if near := deployments.Nearest(token.Value, fields); near != "" {
			says += fmt.Sprintf(": did you mean %q?", near)
		}
	}
	return fmt.Errorf("%s:%d:%d: %s", file, token.Position.Line, token.Position.Column, says)
}

// list splits what a flag or variable gives as a list.
func list(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}

// byteRate reads a number of bytes a second: 20000000, 20M, 20MB/s, 20 MiB, 20mb, 20,000.
func byteRate(s string) (int64, error) {
	t := strings.ToLower(strings.ReplaceAll(strings.TrimSuffix(strings.TrimSpace(s), "/s"), ",", ""))
	if t == "" || t == "0" {
		return 0, nil
	}
	digits := strings.TrimRight(t, " bikmg")
	units := map[string]float64{
		"": 1, "b": 1, "k": 1e3, "kb": 1e3, "m": 1e6, "mb": 1e6, "g": 1e9, "gb": 1e9,
		"ki": 1 << 10, "kib": 1 << 10, "mi": 1 << 20, "mib": 1 << 20, "gi": 1 << 30, "gib": 1 << 30,
	}
	unit, known := units[strings.TrimSpace(t[len(digits):])]
	n, err := strconv.ParseFloat(digits, 64)
	if err != nil || !known || n <= 0 || n*unit > 1e15 {
		return 0, fmt.Errorf("bandwidth %q: want bytes a second, as in 20MB/s", s)
	}
	return int64(n * unit), nil
}
