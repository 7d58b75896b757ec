// Package deployments is the model of kedge: every format that Git, Consul KV, object storage and nodes share, and the
// reference of each. It imports nothing else of kedge but safetext.
//
// People type manifests, unit files, kedge.yaml, agent.yaml, pins and orders. These are parsed strictly: an unknown
// field, a field that is given twice and a bad value are errors with line and column. Programs write records, reports,
// history and mirror state. These are parsed leniently: an unknown field is passed over, so that two versions run side
// by side. A change of a format that an older reader would get dangerously wrong raises min_agent in the record.
//
// Durations are written as in 30s, 5m or 1h30m, at most a year, except in agent.yaml. An amount of nodes is a number,
// or a percentage of the live nodes, rounded up. A pointer is URL@sha256:HEX: where a manifest lies, and the digest of
// its bytes.
//
// # Manifest
//
// A manifest says what a release is and how it goes live. kedge publish writes one beside each archive; stretcher's are
// manifests, too. Once a pointer names a manifest's digest, the manifest never changes. Fields like x-NAME are ignored.
// At most 1 MiB.
//
// Example of a manifest:
//
//	name: app
//	version: 1.4.2
//	src: app-1.4.2.tar.zst
//	checksum: 9f2c4b1e8a7d3f605142c7b9e0d8a6f3154c2e7b9a0d8f6e3c1b5a4972d0e8f1
//	dest: /srv/app
//	sync_strategy: release
//	shared: [log, public/uploads]
//	drain: 5s
//	commands:
//	  env: {RAILS_ENV: production}
//	  pre:
//	    - bin/migrate
//	  post:
//	    - run: systemctl restart app
//	      timeout: 2m
//	secrets: {DB_URL: ssm:/prod/db}
//	health:
//	  stable_for: 10s
//	  checks:
//	    - http: http://127.0.0.1:8080/healthz
//
// Its fields:
//
//	name, version  are shown wherever the release is shown. 1 to 128 letters, digits and . _ + ~ -
//	created        when a signed release was made: a node refuses one below its version floor
//	src            the archive's URL, or a path relative to the manifest's; without it, commands alone
//	checksum       the archive's md5, sha1, sha256 or sha512, told apart by length; needed unless index is there
//	size           the archive's bytes
//	index          where the archive's index lies: an agent then fetches only what changed
//	deltas         archives of what changed against earlier releases, at most 32
//	dest           where the tree goes live: an absolute path
//	dest_mode      the mode of its top directory, in octal (0755)
//	sync_strategy  rsync (the default) and mv are stretcher's; release lies beside dest, and dest is a link to it
//	excludes       rsync's patterns, a list; only with sync_strategy rsync
//	exclude_from   a file of the tree with such patterns, one a line
//	owner          USER, USER:GROUP or :GROUP of the tree, by name or number (whoever the agent runs as)
//	keep           how many old releases stay beside the running and the last good one (3)
//	shared         paths of the tree that live outside of the release and stay across releases
//	symlinks       inside (the default) or any: whether links of the archive may lead out of the tree
//	immutable      true: nothing writes into the live tree, so that the next release may share its files (false)
//	commands       what runs around the switch; see below
//	secrets        variables for all commands, by name, whose values the node reads; see below
//	health         what gates the switch, and goes on for as long as the release is live; see below
//	drain          how long to wait, after /ready turns 503, before the switch (0s)
//
// Of index, and of each of deltas:
//
//	url     where it lies, or a path relative to the manifest's URL
//	size    its bytes
//	sha256  its digest
//	from    of a delta: the digest of the index of the release that it starts from
//
// Of commands; pre, post, success and failure are lists, and the first command that fails ends its list:
//
//	env      variables for all commands, by name, beside those of kedge (KEDGE_...)
//	timeout  of each command that has none of its own (10m)
//	pre      before the switch; if one fails, all stays as it was
//	post     after the switch; if one fails, the node goes back to what it ran before
//	success  after the health checks passed
//	failure  after something failed
//
// Of secrets, each value is a reference: file:/PATH, credential:NAME of systemd, ssm:NAME, secretsmanager:NAME or
// secretsmanager:NAME#FIELD, or vault:PATH#FIELD. A node reads only what secrets in its agent.yaml allows. Values stand
// in the commands' environment alone: logs, status and journals have *** for those of 4 bytes and more.
//
// A command is a text that sh -c runs, or has fields:
//
//	run      the text
//	timeout  ends its whole process group (10m)
//	user     whom it runs as, by name or number (whoever the agent runs as)
//	once     true: it isn't run again when it was cut off, as it restarts the agent or the machine (false)
//
// Of health:
//
//	timeout     how long the checks may take to pass, from the end of post (60s)
//	stable_for  how long they must go on passing (0s: once is enough)
//	every       the time between two rounds while the release is live (10s)
//	failures    how many rounds in a row must fail before the unit is unhealthy (3)
//	checks      a list; all must pass
//
// A check is exactly one of http, tcp, exec, systemd and consul:
//
//	http      a URL that answers 2xx, or fields url, status and contains
//	url       of http
//	status    of http: the one status that passes
//	contains  of http: a text in the first 64 KiB of the body
//	tcp       HOST:PORT that accepts a connection
//	exec      a command that exits 0
//	user      of exec: whom it runs as, by name or number (whoever the agent runs as)
//	systemd   a unit that is active, and doesn't restart meanwhile
//	consul    a service of this node whose checks all pass
//	interval  the time between two tries (1s)
//	timeout   bounds one try (5s)
//	during    deploy: at the switch alone, for what all nodes share, such as a database
//
// {{ env "NAME" "default" }} and {{ must_env "NAME" }} stand for variables of the node.
//
// # Unit file
//
// STAGE/ROLE/UNIT.yaml in the deployments repo is one unit. Its release is one line, for CI, sed and Renovate to
// change. At most 64 KiB.
//
// Example of a unit file:
//
//	release: s3://acme/app/1.4.2.yaml@sha256:9f2c4b1e8a7d3f605142c7b9e0d8a6f3154c2e7b9a0d8f6e3c1b5a4972d0e8f1
//	rollout:
//	  canary: 1
//	  bake: 5m
//	  max_unavailable: 10%
//
// Its fields:
//
//	release  the pointer of what should run
//	after    units of this role that converge first, a list
//	rollout  how a new release reaches the nodes; without it, and without one in kedge.yaml, every node at once
//	drift    report (the default) or heal: what agents do about live files that no longer match their release
//	adopt    true: a tree at dest that is the release's already, byte for byte, is taken over without commands (false)
//
// Of rollout:
//
//	canary           an amount of nodes that go first (0)
//	bake             how long they must stay healthy; without a canary, all nodes before the rollout ends (0s)
//	max_unavailable  an amount of nodes, at least 1, that may be out of service at a time (all)
//	max_failures     an amount of nodes that may fail; one more stops the rollout (0)
//	on_failure       rollback (the default) or pause
//	approval         auto (the default) or manual: wait for kedge promote after the bake
//	deadline         how long an admitted node may take before it counts as failed (10m)
//	fast_back        false: a release that was stable lately goes through the gates, too (true)
//
// # kedge.yaml
//
// kedge.yaml at the top of the deployments repo is what holds for all of it. Every field may be left out.
//
// Example of kedge.yaml:
//
//	sources:
//	  prod: [s3://acme]
//	prune: true
//	rollout:
//	  max_unavailable: 25%
//	freeze:
//	  - name: weekend
//	    deny: "0 16 * * fri"
//	    duration: 64h
//	    zone: Europe/Berlin
//
// Its fields; those that bound something are by stage, "*" for every other one:
//
//	sources       URLs, or prefixes of whole path segments, that releases may come from (any)
//	dests         directories in or below which releases may go live (any)
//	users         users that commands run as and that own trees (any)
//	commands      false: releases may have no commands (true)
//	prune         true: a unit that is removed loses its record; nodes keep what they run (false)
//	max_removed   the percentage of units that one commit may remove, with prune; binds the next commit (30)
//	allow_rewind  true: a head that doesn't descend from the last one is taken; binds the next commit (false)
//	rollout       the rollout of every unit, of which a unit file may override fields; its fields are as there
//	drift         as in the unit file, for all
//	freeze        windows in which no rollout may start, or outside of which none may, a list
//
// Of freeze; each has deny or allow:
//
//	name      is shown to those whose rollouts the window stops
//	deny      when a window begins in which no rollout may start: minute, hour, day, month, day of week
//	allow     when a window begins outside of which no rollout may start
//	duration  how long the window is open, as elapsed time: if the clocks change within it, it ends an hour earlier or
//	          later by the wall clock
//	zone      whose wall clock counts, by its IANA name (UTC)
//	units     patterns STAGE/ROLE/UNIT with * for any name (all)
//	running   finish (the default) or wait: what a rollout under way does
//	reason    is shown to those whose rollouts the window stops
//
// # agent.yaml
//
// /etc/kedge/agent.yaml configures an agent. Each field is also a flag (--state-dir for state_dir) and a variable
// (KEDGE_STATE_DIR). The flag wins over the variable, and the variable over the file. A list is a list, or a text with
// commas.
//
// Example of agent.yaml:
//
//	stage: prod
//	roles: [web]
//	sources: [s3://acme/]
//	dests: [/srv]
//	signers: /etc/kedge/allowed_signers
//	listen: 127.0.0.1:7070
//
// Its fields; stage and roles are needed, unless ec2 gives them:
//
//	stage              the node's stage
//	roles              its roles, a list
//	node               its name (the Consul node's)
//	state_dir          where the agent keeps its journal and what it last knew (/var/lib/kedge)
//	listen             the address of /ready, /converged and /live; of /status and /metrics, too, if it is
//	                   a loopback one (none)
//	listen_status      the address of /status and /metrics for other machines (none)
//	sources            URLs, or prefixes of whole path segments, that releases may come from; http:// of other
//	                   machines must be named (any)
//	local_sources      true: releases may come from this machine: file://, its own addresses, link-local ones (false)
//	mirrors            prefixes of URLs, each with a list of prefixes to read releases from before their own place (none)
//	dests              directories in or below which releases may go live (any)
//	users              users that commands run as and that own trees (any)
//	no_commands        true: releases may have no commands (false)
//	secrets            references, or their beginnings by whole path segments, that releases may have read here (none)
//	signers            a file of SSH keys, of which one must have signed each release (none is asked for)
//	allow_older_pins   true: a pin may name a release made before the node's version floor (false)
//	allow_empty        true: a node without units is ready (false)
//	observe            true, or the units, as STAGE/ROLE/UNIT, each a name or *: fetch their releases, compare them
//	                   with what lies at dest, report that, and touch nothing (false)
//	adopt              true: take over what is a first release's already, as adopt in a unit file (false)
//	maintenance        true: the node is in Consul's maintenance mode while it switches (false)
//	snapshot           the URL of the mirror's copy of the desired state, for a first boot while Consul is away (none)
//	snapshot_signers   a file of SSH keys, of which one must have signed the snapshot
//	snapshot_max_age   how old the snapshot may be (72h)
//	ec2                true: stage and roles come from the instance's tags kedge:stage and kedge:roles (false)
//	lifecycle_hook     the AutoScaling hook to complete once the node has converged (none)
//	lifecycle_timeout  how long the node may take before it is given up (15m)
//	autoscaling_group  the group of the hook (the one in the instance's tags)
//	max_bandwidth      bounds all downloads, as in 20MB/s (none)
//	start_delay        a random time up to this before a fetch, to spread the load of a large fleet (0s)
//	verify_every       how often live trees are compared with their releases; 0s: never (24h)
//	verify             always: hash each file of the running release before reuse, even if it hasn't changed (none)
//	ready_timeout      how long systemd waits for the first convergence (15m)
//
// # Pin
//
// A pin at pins/STAGE/ROLE/UNIT overrides the record on all nodes, one at pins/STAGE/ROLE/UNIT/NODE on one. It counts
// only for a unit that has a record. It is a bare pointer, the word hold, or YAML or JSON with fields. At most 16 KiB.
//
// Example of a pin:
//
//	release: s3://acme/app/1.4.1.yaml@sha256:9f2c4b1e8a7d3f605142c7b9e0d8a6f3154c2e7b9a0d8f6e3c1b5a4972d0e8f1
//	by: alice
//	reason: incident 812
//	until: 2026-12-01T08:00:00Z
//
// Its fields:
//
//	release  the pointer of what is to run
//	hold     true: nodes keep what they run, whatever it is
//	reason   is shown wherever the pin is
//	by       who pinned; is shown, too
//	until    when it ends by itself: a time (never)
//	at_once  true: every node follows at once, whatever max_unavailable says (false)
//
// # Order
//
// An order at control/STAGE/ROLE/UNIT tells the mirror what to do about a rollout. The mirror removes the order once it
// has obeyed or refused it. An order is a bare verb, or YAML or JSON with fields. At most 4 KiB.
//
// Example of an order:
//
//	order: abort
//	by: bob
//	reason: the checkout fails
//
// Its fields:
//
//	order   promote, pause, resume, abort or retry
//	by      who ordered it; stands in the history
//	reason  why; stands in the history
//
// # Record
//
// A record at desired/STAGE/ROLE/UNIT is what a unit should run, and how far the fleet may have gone there. The mirror
// that holds the lease writes it. Where no mirror runs, a person may write a bare pointer. It mostly stays under 1 KB.
//
// Example of a record:
//
//	{"target": "s3://acme/app/1.4.2.yaml@sha256:9f2c4b1e8a7d3f605142c7b9e0d8a6f3154c2e7b9a0d8f6e3c1b5a4972d0e8f1",
//	 "generation": 7, "commit": "4f2c91ab77d05c1e9a0b3d2f6e8c7a5b4d3e2f10",
//	 "rollout": {"phase": "rolling", "cutoff": "9223372036854775807", "since": "2026-11-24T12:00:00Z",
//	  "reason": "Rolling", "facts": {"admitted": "6", "of": "12"}}}
//
// Its fields:
//
//	target      the pointer that Git names, or that a unit pin does
//	stable      what nodes run that are not admitted: the last target that completed its rollout
//	generation  grows with each new target, and when a rollout turns back or is tried again
//	retry       grows with each kedge retry
//	commit      the Git commit that set target or, while target is a pin's, the commit of the target before
//	after       the unit file's
//	drift       the unit file's
//	adopt       the unit file's
//	paced       true: the mirror rolls out unit pins, apart from hold and at_once
//	joined      nodes that joined later keep what they run for now, unless the record names it
//	claim       the generation that first asked for target under its commit: nodes on which target has failed since
//	            don't try it again; negative: lost with the store's data, some generation up to -claim
//	nodes       how many nodes the unit had when its rollout last moved
//	orphaned    true: Git names the unit no longer, and pruning is off
//	pinned      what Git's record was when a unit pin took its place: target, stable, claim, stable_pinned, failed
//	min_agent   the format level that a reader needs to act on it
//	rollout     how far its rollout is; absent when every node is admitted
//
// Of rollout:
//
//	phase               canary, pending-approval, frozen, rolling, paused, rolling-back or rolled-back
//	cutoff              admits the nodes whose rank is not above it; in a rollback these stay for now
//	early               admits canaries that run a target that was replaced
//	fast                true: the rollout needs no gates, as its target was stable before, or is a pin's
//	serving             true: a first release, and something else serves on a node, so that it goes through its gates
//	unproven            true: stable never became healthy everywhere
//	stable_pinned       true: stable is a pin's release, or may be: it raises no version floor
//	since               when the phase, or the last step within it, began
//	reason              why it stands there, as a code
//	facts               what the reason is about
//	message             reason and facts in words
//	failed              the digest that was rolled back: it stays out until Git names another, or kedge retry
//	next                what Git names, and what starts once the nodes are back: a freeze would hold it up before that
//	promoted            true: it is past its canaries
//	no_canary           true: it has none, as the unit's file asked for none when it began
//	forced              true: it may go on within a freeze, by an operator's order or after a pin
//	healthy_since       when the bake began
//	tolerated_failures  how many failed nodes are accepted, by resume or from an earlier rollout
//	superseded          targets that it replaced before their rollouts had ended: digest, cutoff, generation, back
//
// # Report
//
// A report at status/STAGE/ROLE/NODE is what one node says of itself in one role. Its agent writes it on change, and
// its session holds it: an entry without a session is a node that is gone. At most 256 KiB.
//
// Example of a report:
//
//	{"node": "web-1", "agent": "1.4.0", "started": "2026-11-24T11:00:00Z", "joined": "4711", "ready": true,
//	 "units": {"app": {"state": "converged", "version": "1.4.2", "generation": 7, "since": "2026-11-24T12:00:00Z"}}}
//
// Its fields:
//
//	node     the node's name
//	agent    the agent's version
//	started  when the agent started, by the node's clock
//	joined   since when the store has held the report without a gap: larger after each restart; absent in the first one
//	ready    what /ready says
//	reason   what is wrong with the role as a whole, as a code; mostly absent
//	facts    what the reason is about
//	units    by the unit's own name; see below
//
// Of a unit:
//
//	state         converged, waiting, fetching, switching, retrying, quarantined, held, unhealthy or invalid
//	running       the pointer of the release that is live
//	version       its manifest's
//	want          the pointer of what should run
//	message       why want is what should run, or what the unit waits for, in words
//	generation    the record's, as far as the node knows; it may be an earlier one if the node had nothing to do since
//	staged        the digest of a release that lies ready on disk
//	quarantined   digests that failed on this node
//	failed        the digest of want, if it failed on this node and what the node went back to does not serve yet
//	rolling_back  true while the node goes back from a release that failed, until what it goes back to serves
//	reason        why the state is what it is, as a code
//	facts         what the reason is about
//	pinned        true: a pin decided, not the record
//	error         what is wrong now, one line of at most 300 bytes
//	errors        up to three of the newest error lines of the unit's log, newest first: at, text. Only those since
//	              the agent started, as they are not written to the node's disk, which may be what fails. The
//	              node's own log has older ones
//	since         when the state was entered, by the node's clock
//	drift         up to five paths that differ from the release: dest, or paths in its tree
//	serves        true: no release of the unit runs, and something else lies at dest, or another unit deploys there
//	leavable      true while what was at dest before the first release can be put back
//	compared      how the tree at dest differs from a release: release, dest, differs, paths, missing, adopted
//	fetched       bytes so far, while it is fetching
//	total         bytes in all
//
// # History
//
// An entry at history/STAGE/ROLE/UNIT/GENERATION is what a unit was told to run, by whom and when. The mirror writes
// it with the record; the newest 50 of a unit stay.
//
// Example of a history entry:
//
//	{"generation": 7,
//	 "release": "s3://acme/app/1.4.2.yaml@sha256:9f2c4b1e8a7d3f605142c7b9e0d8a6f3154c2e7b9a0d8f6e3c1b5a4972d0e8f1",
//	 "commit": "4f2c91ab77d05c1e9a0b3d2f6e8c7a5b4d3e2f10", "author": "Alice <alice@acme.example>",
//	 "committed": "2026-11-24T11:59:00Z", "at": "2026-11-24T12:00:00Z"}
//
// Its fields:
//
//	generation  the record's
//	release     the pointer that became its target
//	stable      the record's
//	commit      the Git commit that was mirrored then
//	author      the commit's
//	subject     the commit's
//	committed   the commit's time
//	at          when the mirror wrote the entry
//	failed      the digest that was rolled back, or that was replaced after it had failed on a node
//	claim       the record's
//	retry       the record's
//	pinned      the record's, if release is a unit pin's
//	note        what else led to it: an order, a pin, a change by hand that was put back, a rollout that was stopped
//	pins        the pins that stood in this generation, at most 50, the oldest first; see below
//	orders      the orders that the mirror took in it, at most 50, the oldest first; see below
//	truncated   true: there were more pins or orders than the entry keeps
//
// The mirror rewrites the newest entry when it sees that a pin came or ended, and when it takes an order. A pin that is
// in force when the next generation begins is listed in that generation's entry, too, and its end only there.
//
// Of a pin and of an order, the words are cut at 200 bytes. The time "at" is when the mirror saw the pin or took the
// order:
//
//	ended    when a pin had been removed or replaced, or its until had come; missing while it stands
//	node     the one node that a pin was for
//	hold     true: a pin kept what ran
//	reason   why, as the operator said
//	by       who, as the operator said
//	until    when a pin was to end by itself
//	at_once  true: under a pin, nodes did not wait for their turn
//	error    why a pin could not be read: it changed nothing
//	order    promote, pause, resume, abort or retry
//	refused  why an order changed nothing, as a code
//
// # Mirror state
//
// mirror/state is what the mirror that holds the lease last did. That mirror writes it, on change.
//
// Example of mirror state:
//
//	{"holder": "mirror-1", "head": "4f2c91ab77d05c1e9a0b3d2f6e8c7a5b4d3e2f10", "rules": {"max_removed": 30}}
//
// Its fields:
//
//	holder       the mirror's name
//	head         the commit that KV holds
//	author       its author
//	at           when it was applied
//	repo         the address of the repository that head is of
//	past         commits that head descends from, in short and newest first
//	refused      the commit at the branch's head, if it was not taken
//	error        why it was refused, or what else is wrong
//	applying     a commit that takes several transactions, while they are under way
//	freeze       the freeze windows, with the fields that they have in kedge.yaml: to show what is to come
//	freeze_more  how many windows are left out, if there are many
//	rules        settings of the last commit that bind the next: allow_rewind, max_removed
package deployments
